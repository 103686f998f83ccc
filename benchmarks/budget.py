"""Measure how well runs keep their time budget: alone, beside a load from half-way on, and resumed half-way.

    python benchmarks/budget.py --minutes 2 5 15

Every run is a process of its own, one after the other: all cases of both networks take 6 times the sum of the
budgets. Writes benchmarks/results/budget.json after each. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, context, write

NETWORKS = {
    "resnet10, width 16": ["encoder.name=resnet10", "encoder.width=16"],
    "resnet18, width 32": ["encoder.name=resnet18", "encoder.width=32"],
}
"""A step of the second takes several times as long."""


class Start:
    """One start of ``python -m contrastive``, whose run is in ``folder``."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._began, self._table = time.monotonic(), folder / "metrics.csv"
        command = [sys.executable, "-m", "contrastive", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def train(self, seconds: float) -> None:
        """Wait until it has trained for ``seconds``."""
        while self._process.poll() is None and not self._table.is_file():
            time.sleep(0.1)
        time.sleep(seconds)

    def stop(self) -> None:
        """Send SIGTERM: the run saves and ends."""
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> dict[str, Any]:
        """Wait; return exit code, seconds of the process with its imports, and the result it printed."""
        out, _ = self._process.communicate()
        wall_s = round(time.monotonic() - self._began, 1)
        return {"code": self._process.returncode, "wall_s": wall_s, **json.loads(out.splitlines()[-1])}


def alone(start: Callable[[], Start], half_s: float) -> list[dict[str, Any]]:
    """Run without disturbance."""
    return [start().end()]


def beside_load(start: Callable[[], Start], half_s: float) -> list[dict[str, Any]]:
    """Keep every processor busy from half-way on."""
    run = start()
    run.train(half_s)
    with load():
        return [run.end()]


def resumed(start: Callable[[], Start], half_s: float) -> list[dict[str, Any]]:
    """Stop the run half-way, and start it again."""
    run = start()
    run.train(half_s)
    run.stop()
    return [run.end(), start().end()]


CASES: dict[str, Callable[[Callable[[], Start], float], list[dict[str, Any]]]] = {
    "alone": alone,
    "beside a load from half-way on": beside_load,
    "stopped half-way and resumed": resumed,
}


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Run as many busy processes as there are processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processors)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(case: str, network: str, minutes: float, root: str, overrides: list[str]) -> dict[str, Any]:
    """Run one case; return what was done and how far it is from the budget."""
    name = f"{case.split()[0]}-{network.replace(', width ', '-')}-{minutes:g}"
    place = [f"run.root={root}", f"run.name={name}", "run.resume=auto", "logging.wandb.mode=disabled"]
    arguments = [*place, *NETWORKS[network], *overrides, f"schedule.minutes={minutes:g}"]
    starts = CASES[case](lambda: Start(arguments, Path(root, name)), 60 * minutes / 2)
    last = starts[-1]
    return {
        "case": case,
        "network": network,
        "minutes": minutes,
        "spent_minutes": last["spent_minutes"],
        "off": round(last["spent_minutes"] / minutes - 1, 4),
        "codes": [start["code"] for start in starts],
        "wall_s": [start["wall_s"] for start in starts],
        "steps": [start["steps"] for start in starts],
        "planned_steps": last["planned_steps"],
        "epochs": round(last["epochs"], 2),
        "lr_at_the_end": last["metrics"]["train/lr"],
        "knn_top1": last["metrics"].get("knn/top1"),
        "finished": last["finished"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 5.0, 15.0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--root", default="runs/budget", help="folder of the runs, new or empty")
    parser.add_argument("--out", type=Path, default=RESULTS / "budget.json")
    parser.add_argument("overrides", nargs="*", help="key=value for contrastive-pretrain")
    asked = parser.parse_args()
    if Path(asked.root).is_dir() and any(Path(asked.root).iterdir()):
        raise SystemExit(f"--root {asked.root}: is not empty, and its runs would be resumed; name another")
    packages = ("torch", "kornia", "faiss-cpu", "pytorch-lightning")
    document = context("budget", torch.device("cpu"), packages, overrides=asked.overrides)
    runs: list[dict[str, Any]] = []
    for minutes in asked.minutes:
        for network in asked.networks:
            for case in asked.cases:
                runs.append(measure(case, network, minutes, asked.root, asked.overrides))
                print(
                    f"{minutes:g} min, {network}, {case}: {runs[-1]['off']:+.1%}, {runs[-1]['steps']} steps"
                )
                write(asked.out, {**document, "runs": runs})


if __name__ == "__main__":
    main()

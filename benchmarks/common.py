"""Time the arms of a benchmark, describe its context, and write its results."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from contrastive.allocator import keep_freed_memory

keep_freed_memory()  # as the command lines do

RESULTS = Path(__file__).parent / "results"

QUIET = (
    "logging.knn_every_epochs=0",
    "logging.probe_every_epochs=0",
    "logging.mined_rows=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
)
"""Overrides that turn a run's monitors, progress bar and W&B off."""


class Spent(NamedTuple):
    """Seconds of one repeat: wall time, and processor time of all threads of the process."""

    wall: float
    processor: float


class Clock:
    """Measure the time since construction; wait for the device at both ends."""

    def __init__(self, device: torch.device | None = None) -> None:
        _wait(device)
        self._device, self._wall, self._processor = device, time.perf_counter(), time.process_time()

    def stop(self) -> Spent:
        _wait(self._device)
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._processor)


def once(step: Callable[[], object], device: torch.device | None = None) -> Spent:
    """Time one call."""
    clock = Clock(device)
    step()
    return clock.stop()


def take_turns(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: torch.device | None = None,
    warmup: int = 1,
) -> dict[str, list[Spent]]:
    """Time every arm once a round, so that a disturbance of the machine affects all of them.

    Repeat i of one arm and repeat i of another are measured side by side: compare those.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in arms}
    for repeat in range(-warmup, repeats):
        for name, step in arms.items():
            taken = once(step, device)
            if repeat >= 0:
                spent[name].append(taken)
    return spent


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and third quartile: the spread reported beside a median."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def walls(spent: Sequence[Spent]) -> list[float]:
    return [one.wall for one in spent]


def ratios(above: Sequence[Spent], below: Sequence[Spent]) -> list[float]:
    """Return the wall time of ``above`` over that of ``below``, repeat by repeat."""
    return [a.wall / b.wall for a, b in zip(above, below, strict=True)]


def context(benchmark: str, device: torch.device, packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return the context of the numbers: commit, device, threads, versions."""
    return {
        "benchmark": benchmark,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages}
        | {"python": platform.python_version()},
        **more,
    }


def resident() -> int:
    """Return freed memory to the system, then the resident bytes of the process; 0 if unknown."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


def make_files(folder: Path, count: int, side: int) -> Path:
    """Write random JPEG files of ten classes, as smooth and as large as photographs."""
    noise = np.random.default_rng(0)
    stored = 32 if side <= 32 else 320
    for number in range(count):
        path = folder / str(number % 10) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(noise.integers(0, 256, (stored // 4, stored // 4, 3), dtype=np.uint8))
        coarse.resize((stored, stored), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def pyplot() -> Any:
    """Import matplotlib, which only the plots need.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib, or give --no-plot") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_plot(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"written: {path}")


def whole_numbers(text: str) -> list[int]:
    """Parse an argument such as ``50000,200000``."""
    return [int(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    """Parse an argument such as ``0.1,0.2``."""
    return [float(part) for part in text.split(",")]


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _commit() -> str:
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip()


def _processor() -> str:
    """Return the processor's model on Linux, otherwise the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

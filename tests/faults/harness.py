"""Run the command line in separate processes, kill them, and compare the results to the bit."""

import csv
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from contrastive.checkpoint.folder import read_last
from contrastive.checkpoint.integrity import verify
from memory_bank.state import load_state
from tests import tiny
from tests.reference.equal import assert_same

LIMIT_S = 240
ROOT = Path(__file__).parents[2]

TINY = [
    "data.name=images",
    "data.image_size=16",
    *tiny.SETTINGS,
    "mining.min_fill=0.2",
    "schedule.warmup_epochs=1",
    *tiny.QUIET,
    "trainer.accelerator=cpu",
]
"""The digits recipe, small: a step takes a few hundredths of a second."""


class Zygote:
    """The client of zygote.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def start(self, argv: list[str], env: dict[str, str], log: Path, faults: list[list[Any]]) -> int:
        """Fork a run; return its pid."""
        request = {"argv": argv, "env": env, "out": f"{log}.out", "err": f"{log}.err", "faults": faults}
        return int(self._ask({"start": request}))

    def wait(self, pid: int) -> int:
        """Return the exit code of a run, or minus the signal that ended it."""
        try:
            return int(self._ask({"wait": pid}))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self._answer()
            raise TimeoutError(f"process {pid} did not end within {LIMIT_S} s") from None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> str:
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        if not select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            raise TimeoutError
        return self._process.stdout.readline().decode().strip()


@dataclass
class Ended:
    """Exit codes and outputs of a run.

    Attributes:
        codes: Exit code of each rank, or minus the signal.
        out: Their stdout.
        err: Their stderr.
    """

    codes: list[int]
    out: list[str]
    err: list[str]

    @property
    def result(self) -> dict[str, Any]:
        """Return the JSON object in rank 0's last line."""
        found: dict[str, Any] = json.loads(self.out[0].strip().splitlines()[-1])
        return found


@dataclass
class Started:
    """A running command, one process for each rank."""

    zygote: Zygote
    pids: list[int]
    logs: list[Path]

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], number)

    def wait(self) -> Ended:
        codes = [self.zygote.wait(pid) for pid in self.pids]
        texts = [[Path(f"{log}.{kind}").read_text() for log in self.logs] for kind in ("out", "err")]
        return Ended(codes, *texts)


@dataclass
class Lab:
    """A folder with images and runs.

    Attributes:
        zygote: Process that forks the runs.
        folder: Folder with ``photos`` and ``runs``.
        overrides: Overrides of every run.
    """

    zygote: Zygote
    folder: Path
    overrides: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        if not (self.folder / "photos").exists():
            tiny.write_images(self.folder / "photos", 48, size=(20, 24))

    def start(
        self, name: str, *overrides: str, ranks: int = 1, faults: Any = (), env: dict[str, str] | None = None
    ) -> Started:
        """Start the command for run ``name``; ``faults`` is a list for all ranks, or one by rank number."""
        argv = [*TINY, f"data.root={self.folder / 'photos'}", f"run.root={self.folder / 'runs'}"]
        argv += [f"run.name={name}", *self.overrides, *overrides]
        places = [{}] if ranks == 1 else as_ranks(ranks)
        if ranks > 1:
            argv.append(f"trainer.devices={ranks}")
        by_rank = faults if isinstance(faults, dict) else {rank: list(faults) for rank in range(ranks)}
        pids, logs = [], []
        for rank, place in enumerate(places):
            self.count += 1
            logs.append(self.folder / f"log-{self.count}-{name}-rank{rank}")
            pids.append(self.zygote.start(argv, place | (env or {}), logs[-1], by_rank.get(rank, [])))
        return Started(self.zygote, pids, logs)

    def run(self, name: str, *overrides: str, **options: Any) -> Ended:
        """Start a run and wait for its end."""
        return self.start(name, *overrides, **options).wait()

    def finish(self, name: str, *overrides: str, **options: Any) -> "Outcome":
        """Run to the end and check that it succeeded."""
        ended = self.run(name, *overrides, **options)
        assert set(ended.codes) == {0}, "\n".join(ended.err)
        return outcome(self.folder / "runs" / name)

    def kill_when(
        self, moment: str, number: int, name: str, *overrides: str, delay_s: float, ranks: int = 1
    ) -> Ended:
        """Kill -9 every rank, ``delay_s`` after rank 0 signals it (``moment`` is a function of inject.py)."""
        fifo = self.folder / f"fifo-{self.count}"
        os.mkfifo(fifo)
        listener = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        run = self.start(name, *overrides, ranks=ranks, faults={0: [[moment, str(fifo), number]]})
        heard = select.select([listener], [], [], LIMIT_S)[0]
        os.close(listener)
        time.sleep(delay_s)
        run.kill()
        ended = run.wait()
        assert heard, f"{moment} {number} was never signalled: {ended.err}"
        return ended


def as_ranks(world: int) -> list[dict[str, str]]:
    """Return the environment that a launcher gives each of ``world`` processes of one node."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [common | {"LOCAL_RANK": str(r), "RANK": str(r), "NODE_RANK": "0"} for r in range(world)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Outcome:
    """Results of a finished run.

    Attributes:
        rows: Step -> row of metrics.csv, without columns that depend on the machine.
        trainer: Entries of the last checkpoint's trainer.pt that later steps depend on.
        bank: Bytes of its bank.safetensors, hashed.
        encoder: Bytes of encoder.safetensors, hashed.
    """

    rows: dict[int, dict[str, str]]
    trainer: dict[str, Any]
    bank: str
    encoder: str

    def assert_equals(self, other: "Outcome") -> None:
        """Compare losses, weights, optimizer and bank to the bit."""
        assert self.rows.keys() == other.rows.keys()
        assert {step: row for step, row in self.rows.items() if row != other.rows[step]} == {}
        assert_same(self.trainer, other.trainer)
        assert (self.bank, self.encoder) == (other.bank, other.encoder)


def outcome(run_dir: Path) -> Outcome:
    newest = read_last(run_dir / "checkpoints")
    assert newest is not None
    verify(newest)
    trainer = torch.load(newest / "trainer.pt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops", "skipped")
    return Outcome(
        read_rows(run_dir),
        {name: trainer[name] for name in kept},
        sha256(newest / "bank.safetensors"),
        sha256(run_dir / "encoder.safetensors"),
    )


def read_rows(run_dir: Path) -> dict[int, dict[str, str]]:
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    machines = ("seconds", "perf/", "system/")
    kept = [{name: value for name, value in row.items() if not name.startswith(machines)} for row in rows]
    by_step = {int(row["step"]): row for row in kept}
    assert len(by_step) == len(rows)  # no step twice
    return by_step


def load_bank(run_dir: Path) -> dict[str, Any]:
    """Return the bank of the last checkpoint."""
    newest = read_last(run_dir / "checkpoints")
    assert newest is not None
    bank: dict[str, Any] = load_state(newest / "bank.safetensors")["bank"]
    return bank


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

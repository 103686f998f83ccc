"""Inject faults into a run's own process before it starts."""

import functools
import importlib
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from contrastive.callbacks import time_budget
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from contrastive.distributed import rank
from contrastive.logging import throughput
from contrastive.methods.moco import Moco
from contrastive.module import ContrastiveModule


def before(owner: Any, name: str, act: Callable[[Any], None]) -> None:
    """Call ``act(self)`` before every call of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        act(self)
        return original(self, *args, **kwargs)

    setattr(owner, name, method)


def tell_step(fifo: str, step: int) -> None:
    """Write to ``fifo`` when optimizer step ``step`` (or, after a resume, a later one) begins."""
    notify = _Once(fifo)
    before(
        ContrastiveModule, "training_step", lambda module: notify() if module.global_step >= step else None
    )


def tell_save(fifo: str, number: int) -> None:
    """Write to ``fifo`` when the ``number``-th save of this process begins."""
    notify, count = _Once(fifo), iter(range(1, 10**9))
    before(DirectoryCheckpointIO, "save_checkpoint", lambda _: notify() if next(count) == number else None)


def note_rows(path: str) -> None:
    """Append a line ``step id id ...`` for every batch that this rank trains on."""
    step = ContrastiveModule.training_step

    def noting(self: Any, batch: Any, batch_idx: int) -> Any:
        with open(path, "a") as file:
            print(self.global_step, *batch.ids.tolist(), file=file)
        return step(self, batch, batch_idx)

    ContrastiveModule.training_step = noting  # type: ignore[method-assign]


def keep_bank(path: str) -> None:
    """Save this rank's own bank at the end of the run."""
    before(ContrastiveModule, "on_fit_end", lambda module: torch.save(module.miner.bank.state_dict(), path))


def signal_at(step: int, name: str) -> None:
    """Send this process the signal in the middle of optimizer step ``step``."""

    def act(module: Any) -> None:
        if module.global_step == step:
            os.kill(os.getpid(), signal.Signals[name])

    before(ContrastiveModule, "training_step", act)


def hang_at(call: int, where: str) -> None:
    """Hang forever in the ``call``-th call of a method, ``module:Class.method``."""
    module, _, path = where.partition(":")
    owner, _, name = path.partition(".")
    count = iter(range(1, 10**9))
    before(
        getattr(importlib.import_module(module), owner),
        name,
        lambda _: time.sleep(10**6) if next(count) == call else None,
    )


def remove_at(step: int, path: str) -> None:
    """Delete a file at the start of optimizer step ``step``."""
    before(
        ContrastiveModule,
        "training_step",
        lambda module: os.remove(path) if module.global_step == step else None,
    )


def limit_files(size: int, first: int, last: int) -> None:
    """Fail writes that would enlarge a file from step ``first`` to ``last``, as on a full disk."""
    import resource

    usual, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act(module: Any) -> None:
        full = first <= module.global_step <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if full else usual, hard))

    before(ContrastiveModule, "training_step", act)


def kill_workers_at(step: int) -> None:
    """Kill -9 the decoding processes in step ``step``, as the kernel does when memory runs out."""
    import multiprocessing

    def act(module: Any) -> None:
        for child in multiprocessing.active_children() if module.global_step == step else ():
            os.kill(child.pid, signal.SIGKILL)

    before(ContrastiveModule, "training_step", act)


def pretend_speed(step_s: float) -> None:
    """Let a time budget see a clock on which an optimizer step takes ``step_s`` and all else nothing."""
    clock = SimpleNamespace(now=0.0)

    def tick(module: Any) -> None:
        clock.now += step_s

    before(ContrastiveModule, "optimizer_step", tick)
    time_budget.time = SimpleNamespace(monotonic=lambda: clock.now)  # type: ignore[attr-defined]
    throughput.time = SimpleNamespace(perf_counter=lambda: clock.now)  # type: ignore[attr-defined]


def set_clock_back() -> None:
    """Set the clock back by a minute at every reading."""
    start, looks = time.time(), iter(range(10**9))
    time.time = lambda: start - 60 * next(looks)


def poison(*steps: int) -> None:
    """Make the first convolution of queries overflow in these optimizer steps, on rank 0 only.

    Batch norm sees it before the loss does.
    """
    original = Moco.step

    def poisoned(self: Any, views: Any, rows: Any, step: int) -> Any:
        bad = step in steps and rank() == 0
        return original(self, [views[0] * float("inf"), *views[1:]] if bad else views, rows, step)

    Moco.step = poisoned  # type: ignore[method-assign]


class _Once:
    """Write one byte to a fifo, once."""

    def __init__(self, fifo: str) -> None:
        self._fifo, self._notified = fifo, False

    def __call__(self) -> None:
        if not self._notified:
            self._notified = True
            descriptor = os.open(self._fifo, os.O_WRONLY)
            os.write(descriptor, b"!")
            os.close(descriptor)

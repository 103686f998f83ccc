"""Measure throughput: images per second and time per step, without saving and scoring."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from contrastive.lightning_glue import is_logged, log_row

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""Name of the profiler action in which Lightning waits for the loader."""


class Clock(ABC):
    """A callback that measures training, and needs to know of other work, such as saving and scoring."""

    @abstractmethod
    def leave_out(self, work: str, every: int | None, seconds: float) -> None:
        """Note ``seconds`` spent on ``work`` since the last optimizer step; see ``off_the_clock``."""


class Throughput(Callback, Clock):
    """Logs ``perf/images_per_s``, ``perf/step_ms`` and ``perf/data_wait`` at the trainer's log interval.

    Means since the previous row: images (not views) per second over all ranks, milliseconds per
    optimizer step, and the share of that time spent waiting for the loader. Work inside
    :func:`off_the_clock`, such as saving, is not counted. Only the host's clock is read: an accelerator
    runs behind the host, so the numbers are right over an interval, not for one step.

    Args:
        images: Number of images in a batch of this rank.
    """

    def __init__(self, images: Callable[[Any], int] = lambda batch: len(batch.images)) -> None:
        self._images = images
        self._since, self._step, self._count = 0.0, 0, 0
        self._wait_s, self._fetching = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._reset(trainer.global_step)
        self._listen(_profiler(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log at the interval."""
        self._count += self._images(batch)
        step = trainer.global_step
        if step > self._step and is_logged(trainer):
            log_row(trainer, self._metrics(step, trainer.world_size))
            self._reset(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the profiler's methods."""
        self._unlisten(_profiler(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the profiler's methods."""
        self._unlisten(_profiler(trainer))

    def leave_out(self, work: str, every: int | None, seconds: float) -> None:
        """Exclude time that was not spent training."""
        self._since += seconds

    def _metrics(self, step: int, ranks: int) -> dict[str, float]:
        total = time.perf_counter() - self._since
        return {
            "perf/images_per_s": ranks * self._count / total,
            "perf/step_ms": 1000 * total / (step - self._step),
            "perf/data_wait": self._wait_s / total,
        }

    def _reset(self, step: int) -> None:
        self._since, self._step, self._count, self._wait_s = time.perf_counter(), step, 0, 0.0

    def _listen(self, profiler: Any) -> None:
        """Wrap the profiler to measure the time Lightning waits: no callback hook reports it."""
        start, stop = profiler.start, profiler.stop

        def timed_start(action: str) -> None:
            start(action)
            if action == _FETCH:
                self._fetching = time.perf_counter()

        def timed_stop(action: str) -> None:
            stop(action)
            if action == _FETCH:
                self._wait_s += time.perf_counter() - self._fetching

        profiler.start, profiler.stop = timed_start, timed_stop

    def _unlisten(self, profiler: Any) -> None:
        for name in ("start", "stop"):  # instance attributes, which shadow the methods of the class
            vars(profiler).pop(name, None)


def _profiler(trainer: Trainer) -> Any:
    return trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's set-up functions


@contextlib.contextmanager
def off_the_clock(trainer: Trainer, work: str, every: int | None) -> Iterator[None]:
    """Report work other than training (saving, scoring) to every :class:`Clock` of the trainer.

    Args:
        trainer: The trainer, whose callbacks are looked through.
        work: Its name; work of one name is expected to take equally long each time.
        every: Optimizer steps after which it is done again; None for the end of the run alone, which is
            always an occasion.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
            if isinstance(callback, Clock):
                callback.leave_out(work, every, time.perf_counter() - started)

"""How fast a run is, and what does not count."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from contrastive.lightning_glue import is_logged, log_row

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""What Lightning tells its profiler it does while it waits for the loader."""


class Throughput(Callback):
    """Logs ``perf/images_per_s``, ``perf/step_ms`` and ``perf/data_wait`` at the trainer's log interval.

    Means since the previous row: images (not views) a second over all ranks, milliseconds of an optimizer
    step, and the share of that time spent waiting for the loader. What is done :func:`off_the_clock`, such as
    saving, is left out. Only the host's clock is read: on an accelerator, which works behind the host, the
    numbers hold over an interval, not for one step.

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
        """Leave the profiler as it was."""
        self._unlisten(_profiler(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the profiler as it was."""
        self._unlisten(_profiler(trainer))

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training off the clock."""
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
        """Hear when Lightning starts and stops waiting: no callback's hook tells that."""
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
        for name in ("start", "stop"):  # instance attributes, which hid the methods of the class
            vars(profiler).pop(name, None)


def _profiler(trainer: Trainer) -> Any:
    return trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's set-up functions


@contextlib.contextmanager
def off_the_clock(trainer: Trainer) -> Iterator[None]:
    """Around work that is no training (saving, scoring): :class:`Throughput` leaves its time out."""
    started = time.perf_counter()
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
            if isinstance(callback, Throughput):
                callback.leave_out(time.perf_counter() - started)

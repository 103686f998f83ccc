"""Log the progress of a run once a minute, where no progress bar is seen."""

import logging
import time
from datetime import timedelta

import pytorch_lightning as pl

from contrastive.lightning_glue import StepCallback
from contrastive.logging.throughput import Clock
from contrastive.module import ContrastiveModule

logger = logging.getLogger(__name__)

_EVERY_S = 60.0


class LogProgress(StepCallback, Clock):
    """Logs the step, the loss, images per second and the time left, after the first step of each minute.

    The speed is that of the last minute, without other work such as scoring; the time left is by the mean of
    this start of the run, with other work. Only rank 0 logs.
    """

    def __init__(self) -> None:
        self._restart(0)
        self._began, self._first = self._since, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._restart(trainer.global_step)
        self._began, self._first = self._since, self._step

    def leave_out(self, work: str, every: int | None, seconds: float) -> None:
        """Exclude other work from the speed."""
        self._paused_s += seconds

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Log a line, if a minute has passed since the last one."""
        now, plan = time.monotonic(), module.plan
        if now - self._since < _EVERY_S or not trainer.is_global_zero:
            return
        seconds = max(1e-9, now - self._since - self._paused_s)
        ends = [trainer.max_steps] * (trainer.max_steps >= 0) + [plan.total_steps] * plan.has_end
        line = f"step {step}"
        if ends:
            line += f" of {min(ends)}"
        if "loss" in module.diagnostics:
            line += f", loss {float(module.diagnostics['loss']):.4g}"
        line += f", {(step - self._step) * plan.global_batch / seconds:.0f} images/s"
        if ends:
            left_s = (now - self._began) / (step - self._first) * (min(ends) - step)
            line += f", about {timedelta(seconds=round(left_s))} left"
        logger.info("%s", line)
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._since, self._step, self._paused_s = time.monotonic(), step, 0.0

"""Hooks by optimizer step and by epoch of the plan; Lightning sees the whole plan as one pass."""

import logging
import statistics
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from contrastive.module import ContrastiveModule

logger = logging.getLogger(__name__)


class StepCallback(Callback):
    """Calls :meth:`on_step` and :meth:`on_epoch` after the batch that completes an optimizer step."""

    _seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where a resumed run stands."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell micro-batches from steps."""
        assert isinstance(pl_module, ContrastiveModule)
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        self.on_step(trainer, pl_module, step)
        epochs, rest = divmod(step, pl_module.plan.steps_per_epoch)
        if rest == 0:
            self.on_epoch(trainer, pl_module, epochs)

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """``step`` optimizer steps are done."""

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """``epochs`` epochs are done."""


class StepTimer(StepCallback):
    """Tells the seconds of each optimizer step, waiting for the device; for the dry run, which may wait.

    Args:
        most_s: Seconds after which training ends; a second step is always taken, as the first sets things up.

    Attributes:
        seconds: Of each step.
    """

    def __init__(self, most_s: float) -> None:
        self.most_s = most_s
        self.seconds: list[float] = []

    @property
    def typical(self) -> float:
        """Median of the seconds of all steps but the first."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds of the same steps."""
        measured = self.seconds[1:] or self.seconds
        low, _, high = statistics.quantiles(measured, method="inclusive") if measured[1:] else measured * 3
        return low, high

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic()

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Stop and start it; all ranks end at the same step."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        now = time.monotonic()
        self.seconds.append(now - self._since)
        self._since = now
        if trainer.is_global_zero:
            logger.info("step %d: %.2f s", step, self.seconds[-1])
        enough = len(self.seconds) >= 2 and sum(self.seconds) > self.most_s
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)

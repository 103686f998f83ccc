"""Detect a collapse of the embeddings."""

import logging

import pytorch_lightning as pl

from contrastive.lightning_glue import StepCallback, log_row
from contrastive.logging.throughput import off_the_clock
from contrastive.logging.wandb_logger import alert
from contrastive.module import ContrastiveModule
from eval.stats import health

logger = logging.getLogger(__name__)


class WatchHealth(StepCallback):
    """Logs ``stats/*`` of the bank's keys after each epoch; warns of a collapse at once and at the end.

    Args:
        rows: Number of keys to measure, spread evenly over the bank.
    """

    def __init__(self, rows: int = 512) -> None:
        self.rows = rows
        self._warned = False
        self._wrong = ""

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Measure and log the statistics; warn once of a collapse."""
        if not trainer.is_global_zero:
            return
        bank = module.miner.bank.local
        slots = bank.admissible(trainer.global_step).nonzero()[:, 0]
        slots = slots[:: max(1, len(slots) // self.rows)]
        if len(slots) < 2:
            return
        with off_the_clock(trainer, "health", module.plan.steps_per_epoch):
            stats = health(bank.read(slots).float().cpu())
        row = {"rankme": stats.rankme, "uniformity": stats.uniformity, "std": stats.std}
        log_row(trainer, {f"stats/{name}": value for name, value in row.items()} | module.progress())
        self._wrong = ""
        if stats.verdict != "healthy":
            self._wrong = (
                f"{stats.verdict} of the embeddings after epoch {epochs}: effective rank {stats.rankme:.1f} "
                f"of {min(len(slots), bank.dim)}, spread {stats.std:.2f} of 1. Lower optimizer.base_lr, "
                "raise objective.temperature, or give the loss more negatives"
            )
        if self._wrong and not self._warned:
            self._warned = True
            logger.warning("%s", self._wrong)
            alert(trainer, "collapse", self._wrong)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat the warning at the end, unless the run recovered."""
        if self._wrong:
            logger.warning("the run ended with a %s", self._wrong)

"""Log the metrics of a step to all loggers, at an interval."""

import logging
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from contrastive.data.order.base import BankOrder
from contrastive.lightning_glue import StepCallback, is_logged, log_row
from contrastive.logging.memory import peak_memory_mib
from contrastive.logging.metrics_csv import MetricsCsv
from contrastive.module import ContrastiveModule, LastBatch
from contrastive.run_dir import UnreadableFiles

logger = logging.getLogger(__name__)


class LogMetrics(StepCallback):
    """Logs ``train/*`` of the step, ``mining/*`` and ``bank/*`` of the miner, unreadable files and memory.

    ``bank/*`` but ``bank/refused`` is left out where only monitors read the bank.

    Values stay on the device until a row is due, so that other steps do not wait for them.

    Args:
        unreadable: Files that could not be read; counted as ``data/unreadable``.
        labels: Class of each data set row, to measure how many mined negatives are of their query's class
            (``mining/same_label_rate``, of runs that mine); used only here, never by the training step.
    """

    def __init__(self, unreadable: UnreadableFiles, labels: Tensor | None = None) -> None:
        self.unreadable = unreadable
        self.labels = labels
        self._csv: MetricsCsv | None = None
        self._clock: dict[str, Any] = {}
        self._told_unreadable = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rewind metrics.csv to the step resumed from, and continue its clock: no row appears twice."""
        super().on_train_start(trainer, pl_module)
        self._csv = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)
        if self._csv is not None:
            self._csv.rewind(trainer.global_step)
            if self._clock:
                self._csv.load_state_dict(self._clock)
        assert isinstance(pl_module, ContrastiveModule)
        self._tell_unreadable(trainer, pl_module)

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Say how many files the epoch found that cannot be read, if they are decoded in each one."""
        self._tell_unreadable(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it too if the run ends within an epoch."""
        assert isinstance(pl_module, ContrastiveModule)
        self._tell_unreadable(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the clock of metrics.csv."""
        return self._csv.state_dict() if self._csv is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the clock until the loggers exist."""
        self._clock = state_dict

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Log the values of rank 0's share of the batch, and of the whole bank, also to the progress bar."""
        if not is_logged(trainer):
            return
        mined = module.miner.metrics()  # on all ranks, as each may hold a part of the bank
        if not trainer.is_global_zero:
            return
        row: dict[str, float | Tensor] = {
            f"train/{name}": value for name, value in module.diagnostics.items()
        }
        is_read = module.reads_bank or isinstance(module.plan.order, BankOrder)
        for name, value in mined.items():
            if is_read or name == "bank/refused" or not name.startswith("bank/"):
                row[name] = value
        if self.labels is not None and module.last is not None and module.mines:
            row["mining/same_label_rate"] = _same_label_rate(module.last, self.labels)
        row |= {f"train/{name}": value for name, value in module.scheduled.items()}
        row["train/skipped_steps"] = module.guard.skipped_steps
        row["data/unreadable"] = len(self.unreadable)
        row |= peak_memory_mib(module.device)
        log_row(trainer, row | module.progress())
        if "loss" in module.diagnostics:
            module.log("loss", module.diagnostics["loss"], prog_bar=True, logger=False)

    def _tell_unreadable(self, trainer: pl.Trainer, module: ContrastiveModule) -> None:
        if trainer.is_global_zero and len(self.unreadable) > self._told_unreadable:
            self._told_unreadable = len(self.unreadable)
            logger.warning(
                "%d of the %d training files cannot be read and are left out, see %s",
                *(self._told_unreadable, module.plan.rows, self.unreadable.path),
            )


def _same_label_rate(mined: LastBatch, labels: Tensor) -> Tensor:
    """Return the share of the hard negatives with their query's label; NaN without hard negatives."""
    rows = mined.negatives.hard_ids.cpu()
    own, others = labels[mined.ids.cpu()][:, None], labels[rows]
    known = (rows >= 0) & (own >= 0) & (others >= 0)
    return ((own == others) & known).sum() / known.sum()

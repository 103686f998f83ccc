"""What happens in the step, at an interval, to every logger."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from contrastive.callbacks.steps import StepCallback
from contrastive.logging.memory import peak_memory_mib
from contrastive.logging.metrics_csv import MetricsCsv
from contrastive.logging.rows import is_logged, log_row
from contrastive.module import ContrastiveModule, Mined
from contrastive.run_dir import UnreadableFiles


class LogMetrics(StepCallback):
    """Rows of metrics.csv: ``train/*`` of the step, ``mining/*`` and ``bank/*`` of the miner, files, memory.

    Values stay tensors on the device until a row is due, so other steps do not wait for them.

    Args:
        unreadable: Files that could not be read; counted as ``data/unreadable``.
        labels: Class of each data set row, to tell how many mined negatives show the same thing as their
            query (``mining/same_label_rate``); only looked at here, never by the step.
    """

    def __init__(self, unreadable: UnreadableFiles, labels: Tensor | None = None) -> None:
        self.unreadable = unreadable
        self.labels = labels
        self._csv: MetricsCsv | None = None
        self._clock: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let metrics.csv go on from the step that was resumed from: no row twice, the clock not reset."""
        super().on_train_start(trainer, pl_module)
        self._csv = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)
        if self._csv is not None:
            self._csv.rewind(trainer.global_step)
            if self._clock:
                self._csv.load_state_dict(self._clock)

    def state_dict(self) -> dict[str, Any]:
        """The clock of metrics.csv."""
        return self._csv.state_dict() if self._csv is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the loggers are there."""
        self._clock = state_dict

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Hand the values of rank 0's share of the batch to the loggers and to the progress bar."""
        if not is_logged(trainer) or not trainer.is_global_zero:
            return
        row: dict[str, float | Tensor] = {
            f"train/{name}": value for name, value in module.diagnostics.items()
        }
        row |= module.miner.metrics()
        if self.labels is not None and module.last is not None:
            row["mining/same_label_rate"] = _same_label_rate(module.last, self.labels)
        row |= {f"train/{name}": value for name, value in module.scheduled.items()}
        row["train/skipped_steps"] = module.skipped_steps
        row["data/unreadable"] = len(self.unreadable)
        row |= peak_memory_mib(module.device)
        log_row(trainer, row | module.progress())
        if "loss" in module.diagnostics:
            module.log("loss", module.diagnostics["loss"], prog_bar=True, logger=False)


def _same_label_rate(mined: Mined, labels: Tensor) -> Tensor:
    """Share of the hard negatives that have their query's label; NaN without any."""
    found = mined.negatives.hard_ids.cpu()
    own, others = labels[mined.ids.cpu()][:, None], labels[found]
    known = (found >= 0) & (own >= 0) & (others >= 0)
    return ((own == others) & known).sum() / known.sum()

"""Warn if the bank is never mined."""

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch

from contrastive.callbacks.preemption import is_preempted
from contrastive.lightning_glue import StepCallback
from contrastive.logging.wandb_logger import alert
from contrastive.module import ContrastiveModule
from contrastive.short_run import steps_to_fill

logger = logging.getLogger(__name__)


class WatchMining(StepCallback):
    """Warns when the bank stays below ``mining.min_fill``, and at the end of a run that used no row of it.

    Until the bank is filled, negatives come from the batch; rows of images that cannot be read are never
    written, so this may last for the whole run.

    Attributes:
        bank_used: Whether a row of the bank was a negative in any step so far; survives a resume.
    """

    def __init__(self) -> None:
        self.bank_used = False
        self._warned = False

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Check the negatives of the step, until one is from the bank."""
        if not self.bank_used and trainer.is_global_zero:
            self.bank_used = uses_bank(module, step)

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Warn once, an epoch after the bank should have been filled."""
        if self.bank_used or self._warned or not module.plan.has_end or not _mines(trainer, module):
            return
        expected = steps_to_fill(module.plan, module.config.bank, module.config.mining.min_fill)
        if expected is not None and trainer.global_step >= expected + module.plan.steps_per_epoch:
            self._warned = True
            fill = float(module.miner.bank.local.fill())
            text = (
                f"after epoch {epochs} no row of the bank has been a negative: it is filled to {fill:.1%}, "
                f"mining.min_fill={module.config.mining.min_fill:g}; images that cannot be read "
                f"(corrupt.csv) never fill it. Set mining.min_fill={math.floor(100 * fill) / 100:g} or less "
                "in a new run, or repair the files"
            )
            logger.warning("%s", text)
            alert(trainer, "the bank is not mined", text)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn at the end, unless a signal stopped the run, since it is continued then."""
        assert isinstance(pl_module, ContrastiveModule)
        cut_short = is_preempted(trainer) or trainer.global_step < pl_module.plan.total_steps
        if not self.bank_used and not cut_short and _mines(trainer, pl_module):
            logger.warning(
                "no row of the bank was a negative in any of the %d steps: it is filled to %.1f%%, "
                "mining.min_fill=%g; lower mining.min_fill or bank.capacity in a new run",
                trainer.global_step,
                100 * float(pl_module.miner.bank.local.fill()),
                pl_module.config.mining.min_fill,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return whether the bank was used."""
        return {"bank_used": self.bank_used}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether the bank was used."""
        self.bank_used = bool(state_dict["bank_used"])


def _mines(trainer: pl.Trainer, module: ContrastiveModule) -> bool:
    """Return whether this is rank 0 and the method takes negatives from the bank."""
    return trainer.is_global_zero and module.mines


def uses_bank(module: ContrastiveModule, step: int) -> bool:
    """Return whether step ``step`` (from 1) had a negative that is not from its own batch."""
    if module.last is None:
        return False
    negatives = module.last.negatives
    used = (negatives.shared_log_weight > -torch.inf).any(0)
    shared = negatives.shared_ids[used].cpu()
    own = torch.isin(shared, module.plan.ids(step - 1))
    return bool((negatives.hard_ids >= 0).any()) or not bool(own.all())

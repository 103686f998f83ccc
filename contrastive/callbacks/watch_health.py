"""Detect a collapse of the embeddings."""

import pytorch_lightning as pl

from contrastive.callbacks.watcher import Watcher
from contrastive.lightning_glue import log_row
from contrastive.logging.throughput import off_the_clock
from contrastive.module import ContrastiveModule
from eval.stats import health


class WatchHealth(Watcher):
    """Logs ``stats/*`` of the bank's keys after each epoch; warns of a collapse at once and at the end.

    Args:
        rows: Number of keys to measure, spread evenly over the bank.

    Attributes:
        rankme: Effective rank of the keys after the last epoch; None if there were too few to measure.
    """

    def __init__(self, rows: int = 512) -> None:
        super().__init__()
        self.rows = rows
        self.rankme: float | None = None

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Measure and log the statistics; warn once of a collapse."""
        if not trainer.is_global_zero:
            return
        self.rankme = None
        bank = module.miner.bank.local
        slots = bank.admissible(trainer.global_step).nonzero()[:, 0]
        slots = slots[:: max(1, len(slots) // self.rows)]
        if len(slots) < 2:
            return
        with off_the_clock(trainer, "health", module.plan.steps_per_epoch):
            stats = health(bank.read(slots).float().cpu())
        self.rankme = stats.rankme
        row = {"rankme": stats.rankme, "uniformity": stats.uniformity, "std": stats.std}
        log_row(trainer, {f"stats/{name}": value for name, value in row.items()} | module.progress())
        text = (
            f"{stats.verdict} of the embeddings after epoch {epochs}: effective rank {stats.rankme:.1f} "
            f"of {min(len(slots), bank.dim)}, spread {stats.std:.2f} of 1. {_remedy(module)}"
        )
        self.set_warning(trainer, "collapse", None if stats.verdict == "healthy" else text)


def _remedy(module: ContrastiveModule) -> str:
    """Say what to change; where all negatives are the closest rows, first that."""
    mining = module.config.mining
    remedy = "Lower optimizer.base_lr, raise objective.temperature, or give the loss more negatives"
    if module.method.mines and mining.method == "ranked" and not mining.num_uniform:
        mixed = f"set mining.num_uniform={mining.num_hard} (mining.num_hard)"
        remedy = f"All negatives are hard ones: {mixed} or mining=mix first. {remedy}"
    return remedy

"""Train with the batch's views and with the bank's rows at once: arms that tell what makes SimCLR teach more.

SimCLR differs from MoCo in its negatives, in the gradient that they carry, and in its positives, which carry
gradient too. Each method here takes one of these differences away.
"""

from collections.abc import Sequence

from torch import Tensor

from contrastive.distributed import Rows, gather_rows
from contrastive.methods.in_batch import other_images
from contrastive.methods.method import Method, Outcome, Parts, mean_outcome
from contrastive.objectives.build import build_objective


class BatchAndBank(Method):
    """Push both views away from the batch's other views, as SimCLR does, and from mined rows of the bank.

    The bank stores keys of the moving-average network, which no loss compares with anything else.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = parts.config
        self.objective = build_objective(config.objective, config.mining, in_batch=True, seed=config.run.seed)

    def step(self, views: Sequence[Tensor], rows: Rows, step: int) -> Outcome:
        """See Method."""
        first, second = (self.networks.embed(view) for view in views)
        key = self.networks.keys(views[1], rows, step)
        keys = gather_rows(key, rows.sizes)
        mined = self.miner.negatives(
            first.detach(), key, rows.ids, step, batch_keys=keys, batch_ids=rows.all_ids
        )
        batch, _ = other_images((first, second), rows)
        both = mined.with_shared(batch.shared, batch.shared_ids, batch.shared_log_weight)
        pairs = (first, second), (second, first)
        compared = [self.objective(*pair, both, ids=rows.ids, step=step) for pair in pairs]
        return mean_outcome(compared, keys, first.detach(), both)


class BatchAgainstKeys(BatchAndBank):
    """Push both views away from the batch's other views, with gradient, and towards keys without gradient."""

    def step(self, views: Sequence[Tensor], rows: Rows, step: int) -> Outcome:
        """See Method."""
        first, second = (self.networks.embed(view) for view in views)
        key_1, key_2 = (self.networks.keys(view, rows, step) for view in views)
        batch, _ = other_images((first, second), rows)
        pairs = (first, key_2), (second, key_1)
        compared = [self.objective(*pair, batch, ids=rows.ids, step=step) for pair in pairs]
        return mean_outcome(compared, gather_rows(key_2, rows.sizes), first.detach(), batch)


METHODS = {"batch+bank": BatchAndBank, "batch, keys": BatchAgainstKeys}

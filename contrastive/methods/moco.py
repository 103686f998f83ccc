"""MoCo with a bank: negatives are mined from the bank, keys come from the moving-average network."""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import Rows, gather_rows
from contrastive.methods.method import Method, Outcome, Parts, add_own, mean_outcome
from contrastive.objectives.build import Loss
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


class Moco(Method):
    """Match the query of one view with the key of another, push it away from negatives of the bank.

    He et al. 2020 (arXiv:1911.05722), algorithm 1. Differs: negatives are chosen by the miner
    instead of being the whole queue, and the loss is any objective on given negatives.

    With ``objective.symmetric`` the query of view 2 is matched with the key of view 1, too. Negatives of the
    batch are then this key's: MoCo v3, algorithm 1 (Chen et al. 2021, arXiv:2104.02057; there the sum is
    multiplied by 2 temperature, here it is the mean). The bank has keys of view 2 alone, found by one look-up
    an image, and serves both directions, so there the views must be alike (``fit_checks.check_views``).

    With ``objective.own_negatives`` each query also has a negative of its own: its view, disturbed in time
    or another clip of its video, embedded by the key network.

    With more than two views (multi-crop: Caron et al. 2020, arXiv:2006.09882, section 3.2) local views are
    queries only: each is matched with every key of a global view (one, or two if symmetric), among the
    negatives of this key.

    Args:
        parts: See Method.
        objective: The loss; None builds the one that the config names.
    """

    takes_own_negatives = True

    def __init__(self, parts: Parts, objective: Loss | None = None) -> None:
        super().__init__(parts)
        self.objective: Loss = objective or self.build_loss()
        self.symmetric = parts.config.objective.symmetric

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. The bank stores the keys of view 2."""
        views, other = self.take_other(views)
        own_of = partial(self.own_negatives, other=other, rows=rows, step=step)
        query, key = self.networks.embed(views[0]), self.networks.keys(views[1], rows, step)
        keys = gather_rows(key, rows.sizes)
        negatives = self._mine(query, key, keys, rows, step)
        pairs = [(query, own_of(views[0]), key, negatives)]
        if self.symmetric:
            second, first_key = self.networks.embed(views[1]), self.networks.keys(views[0], rows, step)
            among = negatives
            if not self.miner.method.uses_bank:
                among = self._mine(second, first_key, gather_rows(first_key, rows.sizes), rows, step)
            pairs.append((second, own_of(views[1]), first_key, among))
        local = [(self.networks.embed(view), own_of(view)) for view in views[2:]]
        pairs += [(crop, own, key, among) for _, _, key, among in list(pairs) for crop, own in local]
        compared = [
            self.compare(query, key, add_own(among, own), rows, step) for query, own, key, among in pairs
        ]
        return mean_outcome(compared, keys, query.detach(), negatives)

    def _mine(self, query: Tensor, key: Tensor, keys: Tensor, rows: Rows, step: int) -> Negatives:
        """Find the negatives of this rank's queries; ``keys`` are the gathered ``key``."""
        return self.miner.negatives(
            query.detach(), key, rows.ids, step, batch_keys=keys, batch_ids=rows.all_ids
        )

    def compare(
        self,
        query: Float[Tensor, "b d"],
        key: Float[Tensor, "b d"],
        negatives: Negatives,
        rows: Rows,
        step: int,
    ) -> tuple[Float[Tensor, ""], Diagnostics]:
        """Compute the loss of one pair of views."""
        return self.objective(query, key, negatives, ids=rows.ids, step=step)

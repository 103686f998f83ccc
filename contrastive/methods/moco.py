"""MoCo with a bank: negatives are mined from the bank, keys come from the moving-average network."""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import Rows, gather_rows
from contrastive.methods.method import Method, Outcome, Parts, mean_outcome
from contrastive.objectives.build import Loss, build_objective
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


class Moco(Method):
    """Match the query of one view with the key of another, push it away from negatives of the bank.

    He et al. 2020 (arXiv:1911.05722), algorithm 1. Differs: negatives are chosen by the miner
    instead of being the whole queue, and the loss is any objective on given negatives.

    With ``objective.own_negatives`` each query also has a negative of its own: its view, disturbed in time
    or another clip of its video, embedded by the key network.

    With more than two views (multi-crop: Caron et al. 2020, arXiv:2006.09882, section 3.2) local views are
    queries only: each is matched with every key of a global view (one, or two if symmetric).

    Args:
        parts: See Method.
        objective: The loss; None builds the one that the config names.
    """

    takes_own_negatives = True

    def __init__(self, parts: Parts, objective: Loss | None = None) -> None:
        super().__init__(parts)
        config = parts.config
        self.objective: Loss = objective or build_objective(
            config.objective, config.mining, seed=config.run.seed, labels=parts.labels
        )
        self.symmetric = config.objective.symmetric

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. The bank stores the keys of view 2; one look-up per image serves all its views."""
        views, other = self.take_other(views)
        query = self.networks.embed(views[0])
        key = self.networks.keys(views[1], rows, step)
        keys = gather_rows(key, rows.sizes)
        negatives = self.miner.negatives(
            query.detach(), key, rows.ids, step, batch_keys=keys, batch_ids=rows.all_ids
        )
        against = partial(self.with_own_negatives, negatives, other=other, rows=rows, step=step)
        pairs = [(query, key, against(views[0]))]
        if self.symmetric:
            second = self.networks.embed(views[1]), self.networks.keys(views[0], rows, step)
            pairs.append((*second, against(views[1])))
        local = [(self.networks.embed(view), against(view)) for view in views[2:]]
        pairs += [(crop, global_key, own) for _, global_key, _ in list(pairs) for crop, own in local]
        compared = [self.compare(*pair, rows, step) for pair in pairs]
        return mean_outcome(compared, keys, query.detach(), negatives)

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

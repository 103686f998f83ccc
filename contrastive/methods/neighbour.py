"""MoCo with the key's nearest neighbour in the bank as a positive."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.distributed import Rows
from contrastive.methods.moco import Moco
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


class Neighbour(Moco):
    """Moco with the bank's nearest row to the key as a further positive.

    The positive is that of NNCLR (Dwibedi et al. 2021, arXiv:2104.14548), the negatives are mined. With
    ``objective.name=neighbour_info_nce`` the neighbour replaces the key, with other losses both are
    positives.
    """

    finds_neighbours = True

    def compare(
        self,
        query: Float[Tensor, "b d"],
        key: Float[Tensor, "b d"],
        negatives: Negatives,
        rows: Rows,
        step: int,
    ) -> tuple[Float[Tensor, ""], Diagnostics]:
        """Look up the key's neighbour and compute the loss of one pair of views. Collective."""
        ids, neighbours = self.nearest_rows(key, rows, step)
        return super().compare(query, key, attach_neighbour(negatives, neighbours, ids), rows, step)


def attach_neighbour(
    negatives: Negatives, neighbour: Float[Tensor, "b d"], ids: Int[Tensor, " b"]
) -> Negatives:
    """Return ``negatives`` with one more extra positive per query, which is excluded from its negatives.

    Args:
        negatives: Not modified.
        neighbour: Unit-norm rows of the bank, detached.
        ids: Data set rows of the neighbours; -1 where there is none: that row is not used.
    """
    rows, known = ids[:, None], ids[:, None] >= 0
    positives, weight = negatives.extra_positives, negatives.extra_positive_weight
    return replace(
        negatives,
        hard_log_weight=negatives.hard_log_weight.masked_fill(
            known & (negatives.hard_ids == rows), -torch.inf
        ),
        shared_log_weight=negatives.shared_log_weight.masked_fill(
            known & (negatives.shared_ids == rows), -torch.inf
        ),
        extra_positives=torch.cat([positives, neighbour[:, None].to(positives.dtype)], 1),
        extra_positive_weight=torch.cat([weight, known.to(weight.dtype)], 1),
    )

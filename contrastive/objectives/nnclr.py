"""NNCLR: the positive is a neighbour from the bank."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.objectives.logits import Diagnostics, Logits, info_nce_of
from memory_bank.negatives import Negatives


def nnclr(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """InfoNCE towards the extra positives alone; towards the key where a query has none.

    ``-log e^n / (e^n + sum_j w_j e^(s_j))``, n the query's similarity to the bank's nearest row to its key,
    over temperature: NNCLR eq. 2 (Dwibedi et al. 2021, arXiv:2104.14548). Differs: negatives are the given
    ones, not the batch's keys. ``attach_neighbour`` makes a row of the bank the extra positive.

    Args and returns as ``info_nce``; a further diagnostic is ``neighbours``, the share of queries with one.
    """
    logits = Logits.of(query, key, negatives, temperature)
    found = negatives.extra_positive_weight.sum(1, keepdim=True) > 0
    weight = logits.positive_weight
    weight = torch.cat([weight[:, :1].masked_fill(found, 0.0), weight[:, 1:]], 1)
    logits = replace(logits, positive_weight=weight / weight.sum(1, keepdim=True))
    return info_nce_of(logits), logits.diagnostics() | {"neighbours": found.to(weight.dtype).mean()}


def attach_neighbour(
    negatives: Negatives, neighbour: Float[Tensor, "b d"], ids: Int[Tensor, " b"]
) -> Negatives:
    """``negatives`` with one more extra positive a query, which is excluded from its negatives.

    Args:
        negatives: Left as they are.
        neighbour: Unit-norm rows of the bank, detached.
        ids: Their data set rows; -1 where there is none: that row is not used.
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

"""InfoNCE with a neighbour from the bank as the positive."""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.logits import Diagnostics, Logits, info_nce_of
from memory_bank.negatives import Negatives


def neighbour_info_nce(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Compute InfoNCE with only the extra positives; with the key for a query that has none.

    ``-log e^n / (e^n + sum_j w_j e^(s_j))``, n the query's similarity to the bank's nearest row to its key,
    over temperature: NNCLR's positive (Dwibedi et al. 2021, arXiv:2104.14548) against mined negatives.
    Differs: the paper compares the neighbour with the predictions of the batch, as ``nnclr`` does.
    ``attach_neighbour`` makes a row of the bank the extra positive.

    For arguments and result see ``info_nce``; a further diagnostic is ``neighbours``, the share of queries
    with one.
    """
    logits = Logits.of(query, key, negatives, temperature)
    has_neighbour = negatives.extra_positive_weight.sum(1, keepdim=True) > 0
    weight = logits.positive_weight
    weight = torch.cat([weight[:, :1].masked_fill(has_neighbour, 0.0), weight[:, 1:]], 1)
    logits = replace(logits, positive_weight=weight / weight.sum(1, keepdim=True))
    return info_nce_of(logits), logits.diagnostics() | {"neighbours": has_neighbour.to(weight.dtype).mean()}


def build(settings: LossSettings) -> Objective:
    """Build ``neighbour_info_nce`` for a run."""
    loss = partial(neighbour_info_nce, temperature=settings.config.temperature)
    return Objective("neighbour_info_nce", loss)

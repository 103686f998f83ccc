"""InfoNCE with a neighbour from the bank as positive."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.objectives.logits import Diagnostics, Logits, info_nce_of
from memory_bank.negatives import Negatives


def neighbour_info_nce(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """InfoNCE towards the extra positives alone; towards the key where a query has none.

    ``-log e^n / (e^n + sum_j w_j e^(s_j))``, n the query's similarity to the bank's nearest row to its key,
    over temperature: NNCLR's positive (Dwibedi et al. 2021, arXiv:2104.14548) against mined negatives.
    Differs from the paper, whose softmax is at the neighbour, over the predictions of the batch: ``nnclr``.
    ``attach_neighbour`` makes a row of the bank the extra positive.

    Args and returns as ``info_nce``; a further diagnostic is ``neighbours``, the share of queries with one.
    """
    logits = Logits.of(query, key, negatives, temperature)
    found = negatives.extra_positive_weight.sum(1, keepdim=True) > 0
    weight = logits.positive_weight
    weight = torch.cat([weight[:, :1].masked_fill(found, 0.0), weight[:, 1:]], 1)
    logits = replace(logits, positive_weight=weight / weight.sum(1, keepdim=True))
    return info_nce_of(logits), logits.diagnostics() | {"neighbours": found.to(weight.dtype).mean()}

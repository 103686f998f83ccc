"""Decoupled contrastive learning: the positive is left out of the denominator."""

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import gather_rows
from contrastive.objectives.logits import Diagnostics, Logits
from memory_bank.negatives import Negatives


def dcl(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """``-s + log sum_j w_j e^(s_j)``: DCL eq. 6 (Yeh et al. 2021, arXiv:2110.06848), averaged over b.

    Easy negatives no longer fade the positive's gradient, which helps small batches. The loss may be
    negative. A query without negatives has nothing to be told from: it contributes 0 and no gradient.

    Args and returns as ``info_nce``.
    """
    logits = Logits.of(query, key, negatives, temperature)
    return _decoupled(logits, torch.ones_like(logits.positive)), logits.diagnostics()


def dclw(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    negatives: Negatives,
    *,
    temperature: float,
    sigma: float = 0.5,
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """DCL with ``v s`` for ``s``, ``v = 2 - e^(c / sigma) / mean_b e^(c / sigma)``, c the key's cosine.

    DCLW, section 3 of arXiv:2110.06848: pairs that agree already are pulled less (von Mises-Fisher
    weights, mean 1 over the batch of all ranks). The weights carry no gradient.

    Collective: every rank must call it.

    Args:
        query: As ``info_nce``, and likewise the next three.
        key: See query.
        negatives: See query.
        temperature: See query.
        sigma: > 0; the paper's is 0.5.
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: more than 0 is needed; the paper's is 0.5")
    logits = Logits.of(query, key, negatives, temperature)
    agreement = logits.positive[:, 0].detach() * temperature / sigma
    everyone = gather_rows(agreement)
    pull = 2 - len(everyone) * (agreement - everyone.logsumexp(0)).exp()
    return _decoupled(logits, pull[:, None]), logits.diagnostics()


def _decoupled(logits: Logits, pull: Tensor) -> Tensor:
    partition = logits.log_sum()[:, None]
    losses = partition - pull * logits.positive
    return logits.over_positives(torch.where(partition > -torch.inf, losses, 0.0))

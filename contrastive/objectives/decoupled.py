"""Decoupled contrastive losses (DCL, DCLW): InfoNCE without the positive in the denominator."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import gather_rows
from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.logits import Diagnostics, Logits
from memory_bank.negatives import Negatives


def dcl(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Compute DCL, ``-s + log sum_j w_j e^(s_j)``, mean over b: Yeh et al. 2021 (arXiv:2110.06848), eq. 6.

    Easy negatives no longer weaken the positive's gradient, which helps small batches. The loss may be
    negative. A query without negatives contributes 0 and no gradient.

    For arguments and result see ``info_nce``.
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
    """Compute DCLW: ``v s`` for ``s``, ``v = 2 - e^(c / sigma) / mean_b e^(c / sigma)``, c the key's cosine.

    Section 3 of arXiv:2110.06848: pairs that agree already are pulled less (von Mises-Fisher
    weights, mean 1 over the batch of all ranks). The weights carry no gradient.

    Collective: every rank must call it.

    Args:
        query: See ``info_nce``.
        key: See ``info_nce``.
        negatives: See ``info_nce``.
        temperature: See ``info_nce``.
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


def build_dcl(settings: LossSettings) -> Objective:
    """Build ``dcl`` for a run."""
    return Objective("dcl", partial(dcl, temperature=settings.config.temperature))


def build_dclw(settings: LossSettings, sigma: float) -> Objective:
    """Build ``dclw`` for a run."""
    return Objective("dclw", partial(dclw, temperature=settings.config.temperature, sigma=sigma))

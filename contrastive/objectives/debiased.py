"""Losses that correct for false negatives in expectation, and that weight negatives by hardness."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.objectives.logits import Diagnostics, Logits, info_nce_of
from memory_bank.negatives import Negatives


def debiased(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    negatives: Negatives,
    *,
    temperature: float,
    tau_plus: float,
    hard_weighted: bool = False,
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """InfoNCE whose negatives are freed, on average, of the ``tau_plus`` of them that are positives.

    ``-log e^s / (e^s + N g)`` with ``g = max((mean_j e^(s_j) - tau_plus e^s) / (1 - tau_plus), e^(-1/T))``:
    Chuang et al. 2020 (arXiv:2007.00224), eq. 8, T the temperature. It is ``hcl`` with ``beta=0``.

    Args and returns as ``hcl``.
    """
    return hcl(
        query,
        key,
        negatives,
        temperature=temperature,
        tau_plus=tau_plus,
        beta=0.0,
        hard_weighted=hard_weighted,
    )


def hcl(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    negatives: Negatives,
    *,
    temperature: float,
    tau_plus: float,
    beta: float,
    hard_weighted: bool = False,
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Debiased InfoNCE with each negative's share proportional to ``e^(beta s_j)``.

    ``-log e^s / (e^s + N g)``, ``g = max((h - tau_plus e^s) / (1 - tau_plus), e^(-1/T))`` and
    ``h = sum_j w_j e^((1 + beta) s_j) / sum_j w_j e^(beta s_j)``, ``N = sum_j w_j``: Robinson et al. 2021
    (arXiv:2010.04592), eq. 4 to 6, with beta on the logits as in the authors' code. With ``beta=0`` and
    ``tau_plus=0`` it is ``info_nce``. Several positives enter ``tau_plus e^s`` by their mean, as the M
    positives of Chuang et al. eq. 7.

    Both corrections assume that the negatives, with their weights, are drawn from the data. Rows chosen for
    being close are not: their false negatives are far more than ``tau_plus``, and ``beta`` would count
    hardness twice.

    Args:
        query: As ``info_nce``, and likewise the next three.
        key: See query.
        negatives: See query.
        temperature: See query.
        tau_plus: Share of images that are the same thing, in [0, 1).
        beta: >= 0; 0.5 to 2 is usual.
        hard_weighted: The caller vouches that log-weights make hard and shared negatives together a fair
            sample of the data (``mining.method=full_bank`` does).

    Returns:
        As ``info_nce``.

    Raises:
        ValueError: a parameter out of range, or hard negatives that nobody vouches for.
    """
    if not 0 <= tau_plus < 1 or not beta >= 0:
        raise ValueError(f"tau_plus={tau_plus}, beta={beta}: 0 <= tau_plus < 1 and beta >= 0 are needed")
    if negatives.hard_index.shape[1] and not hard_weighted:
        raise ValueError(
            f"{negatives.hard_index.shape[1]} hard-mined negatives per query: debiased and hcl need a fair "
            "sample of the data; use uniform ones (mining.num_hard=0), mining.method=all_rows, or weighted "
            "ones (full_bank)"
        )
    logits = Logits.of(query, key, negatives, temperature)
    return info_nce_of(logits, _corrected(logits, tau_plus, beta)), logits.diagnostics()


def _corrected(logits: Logits, tau_plus: float, beta: float) -> Float[Tensor, " b"]:
    """``log(N g)``; -inf for a query without negatives."""
    count, tilt, tilted = logits.log_sum(0.0), logits.log_sum(beta), logits.log_sum(1 + beta)
    some = count > -torch.inf
    # where() before arithmetic: -inf minus -inf is NaN, and its gradient too although it is masked later.
    count, tilt, tilted = (torch.where(some, value, 0.0) for value in (count, tilt, tilted))
    hardened = tilted - tilt + count
    positive = torch.logsumexp(logits.positive + logits.positive_weight.log(), 1)
    share = math.log(tau_plus) if tau_plus > 0 else -math.inf
    total = _log_difference(hardened, share + count + positive) - math.log1p(-tau_plus)
    return torch.where(some, torch.maximum(total, count - 1 / logits.temperature), -torch.inf)


def _log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """``log(e^larger - e^smaller)``; -inf, with no gradient, where that is not positive."""
    gap = smaller - larger
    positive = gap < -torch.finfo(gap.dtype).tiny
    # As in _corrected: the unused branch must be finite too, or its zero gradient turns into NaN.
    remaining = torch.log(-torch.expm1(torch.where(positive, gap, -1.0)))
    return torch.where(positive, larger + remaining, -torch.inf)

"""Debiased InfoNCE and HCL: correct for false negatives in expectation, weight negatives by hardness."""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError
from contrastive.objectives.build import LossSettings, Objective
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
    """Compute debiased InfoNCE: corrected, on average, for the share ``tau_plus`` of false negatives.

    ``-log e^s / (e^s + N g)`` with ``g = max((mean_j e^(s_j) - tau_plus e^s) / (1 - tau_plus), e^(-1/T))``:
    Chuang et al. 2020 (arXiv:2007.00224), eq. 8, T the temperature. It is ``hcl`` with ``beta=0``.

    For arguments and result see ``hcl``.
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
    """Compute HCL: debiased InfoNCE with each negative weighted in proportion to ``e^(beta s_j)``.

    ``-log e^s / (e^s + N g)``, ``g = max((h - tau_plus e^s) / (1 - tau_plus), e^(-1/T))`` and
    ``h = sum_j w_j e^((1 + beta) s_j) / sum_j w_j e^(beta s_j)``, ``N = sum_j w_j``: Robinson et al. 2021
    (arXiv:2010.04592), eq. 4 to 6, with beta on the logits as in the authors' code. With ``beta=0`` and
    ``tau_plus=0`` it is ``info_nce``. With several positives, ``tau_plus e^s`` takes their mean, like
    the M positives of Chuang et al. eq. 7.

    Both corrections assume that the negatives, with their weights, are drawn from the data. Rows chosen for
    being close are not: far more than ``tau_plus`` of them are false negatives, and ``beta`` would count
    hardness twice.

    Args:
        query: See ``info_nce``.
        key: See ``info_nce``.
        negatives: See ``info_nce``.
        temperature: See ``info_nce``.
        tau_plus: Probability that a random image is of the query's class, in [0, 1).
        beta: >= 0; 0.5 to 2 is usual.
        hard_weighted: Whether log-weights make hard and shared negatives together a fair sample of the data
            (they do with ``mining.method=full_bank``).

    Returns:
        See ``info_nce``.

    Raises:
        ValueError: a parameter out of range, or hard negatives without ``hard_weighted``.
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
    """Compute ``log(N g)``; -inf for a query without negatives."""
    count, tilt, tilted = logits.log_sum(0.0), logits.log_sum(beta), logits.log_sum(1 + beta)
    some = count > -torch.inf
    # where() before arithmetic: -inf minus -inf is NaN, and so is its gradient, even if masked later.
    count, tilt, tilted = (torch.where(some, value, 0.0) for value in (count, tilt, tilted))
    hardened = tilted - tilt + count
    positive = torch.logsumexp(logits.positive + logits.positive_weight.log(), 1)
    share = math.log(tau_plus) if tau_plus > 0 else -math.inf
    total = _log_difference(hardened, share + count + positive) - math.log1p(-tau_plus)
    return torch.where(some, torch.maximum(total, count - 1 / logits.temperature), -torch.inf)


def _log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """Compute ``log(e^larger - e^smaller)``; -inf, without gradient, where that is not positive."""
    gap = smaller - larger
    positive = gap < -torch.finfo(gap.dtype).tiny
    # Keep the unused branch finite, as in _corrected: else its zero gradient becomes NaN.
    remaining = torch.log(-torch.expm1(torch.where(positive, gap, -1.0)))
    return torch.where(positive, larger + remaining, -torch.inf)


def build_hcl(settings: LossSettings, tau_plus: float, beta: float) -> Objective:
    """Build ``hcl`` for a run.

    Raises:
        UserError: see ``_shared_settings``.
    """
    return Objective("hcl", partial(hcl, beta=beta, **_shared_settings(settings, tau_plus)))


def build_debiased(settings: LossSettings, tau_plus: float) -> Objective:
    """Build ``debiased`` for a run.

    Raises:
        UserError: tau_plus is 0; see also ``_shared_settings``.
    """
    shared = _shared_settings(settings, tau_plus)
    if tau_plus == 0:
        raise UserError(
            "objective.name=debiased with tau_plus=0 is info_nce; set mining.class_prior (0.1 for CIFAR-10) "
            "or objective.tau_plus"
        )
    return Objective("debiased", partial(debiased, **shared))


def _shared_settings(settings: LossSettings, tau_plus: float) -> dict[str, Any]:
    """Return the arguments of both losses, after checking that negatives are a fair sample of the data.

    Raises:
        UserError: negatives are chosen for being close, or tau_plus is 1.
    """
    config, mining = settings.config, settings.mining
    fair = settings.in_batch or mining.method != "ranked"
    if mining.num_hard and not fair:
        raise UserError(
            f"objective.name={config.name} assumes negatives drawn from the data, "
            f"mining.num_hard={mining.num_hard} picks the closest; "
            "set mining.num_hard=0, mining.method=all_rows or full_bank, or method=simclr"
        )
    if config.own_negatives != "none":
        raise UserError(
            f"objective.name={config.name} assumes negatives drawn from the data, "
            f"objective.own_negatives={config.own_negatives} makes them of the query's own clip; leave it "
            "out, or use objective.name=info_nce"
        )
    if tau_plus >= 1:
        raise UserError(f"objective.tau_plus={tau_plus} (from mining.class_prior): less than 1 is needed")
    return {"temperature": config.temperature, "tau_plus": tau_plus, "hard_weighted": fair}

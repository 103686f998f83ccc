"""MoCHi: synthetic negatives, mixed from the hardest negatives and from the query."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive.augment.noise import uniforms as draw
from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives

STREAM = 1_000
"""Noise stream for synthetic negatives; the views of an image use small numbers."""


def mixing(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    negatives: Negatives,
    *,
    temperature: float,
    hardest: int,
    num_pairs: int,
    num_query: int,
    uniforms: Float[Tensor, "b u"],
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Compute InfoNCE over the negatives and additional synthetic ones (MoCHi).

    Section 4 of MoCHi (Kalantidis et al. 2020, arXiv:2010.01028). Of the ``hardest`` negatives n of a query:
    ``num_pairs`` times ``a n_i + (1 - a) n_j`` (eq. 3; a in [0, 1)) and ``num_query`` times
    ``c q + (1 - c) n_i`` (eq. 4; c in [0, 0.5), so that the negative dominates), each normalised, i and j
    random. They carry no gradient and have weight 1. A query without negatives gets none.

    Args:
        query: See ``info_nce``.
        key: See ``info_nce``.
        negatives: See ``info_nce``.
        temperature: See ``info_nce``.
        hardest: Candidates per query, 1 or more; all negatives if there are fewer.
        num_pairs: Synthetic negatives mixed from two negatives; the paper's s.
        num_query: Synthetic negatives mixed with the query; the paper's s'.
        uniforms: In [0, 1): ``num_uniforms(num_pairs, num_query)`` per row. They are the only randomness, so
            equal numbers give equal losses.

    Raises:
        ValueError: counts out of range, or too few uniforms.
    """
    wanted = num_uniforms(num_pairs, num_query)
    if hardest < 1 or min(num_pairs, num_query) < 0 or uniforms.shape[1] < wanted:
        raise ValueError(
            f"hardest={hardest}, num_pairs={num_pairs}, num_query={num_query}, {uniforms.shape[1]} uniforms: "
            f"hardest >= 1, counts >= 0 and {wanted} uniforms a row are needed"
        )
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        mixed = _mix(_as_float(query), negatives, hardest, num_pairs, num_query, uniforms)
    return info_nce(query, key, mixed, temperature=temperature)


def num_uniforms(num_pairs: int, num_query: int) -> int:
    """Count the random numbers per query: two rows and a share for a pair, one and a share with the query."""
    return 3 * num_pairs + 2 * num_query


def _mix(
    query: Tensor, negatives: Negatives, hardest: int, num_pairs: int, num_query: int, uniforms: Tensor
) -> Negatives:
    """Append the synthetic rows to the hard negatives."""
    hard, shared = _as_float(negatives.hard)[negatives.hard_index], _as_float(negatives.shared)
    columns, admitted = _hardest(query, hard, shared, negatives, hardest)
    if columns.shape[1] == 0:
        return negatives
    sizes = [num_pairs, num_pairs, num_pairs, num_query, num_query]
    row_i, row_j, share, row_q, share_q = torch.split(uniforms.to(query.dtype), sizes, dim=1)
    first, second, beside = (
        _rows_at(_pick(columns, admitted, draw), hard, shared) for draw in (row_i, row_j, row_q)
    )
    share, share_q = share[..., None], share_q[..., None] / 2
    pairs = share * first + (1 - share) * second
    with_query = share_q * query[:, None] + (1 - share_q) * beside
    synthetic = F.normalize(torch.cat([pairs, with_query], 1), dim=2)
    none = torch.where(admitted.any(1), 0.0, -torch.inf)[:, None].expand(-1, synthetic.shape[1])
    ids = negatives.hard_ids.new_full(synthetic.shape[:2], -1)
    own = torch.cat([hard, synthetic.to(hard.dtype)], 1)
    return replace(
        negatives,
        hard=own.flatten(0, 1),
        hard_index=torch.arange(own.shape[0] * own.shape[1], device=own.device).view(own.shape[:2]),
        hard_log_weight=torch.cat([negatives.hard_log_weight, none.to(negatives.hard_log_weight)], 1),
        hard_ids=torch.cat([negatives.hard_ids, ids], 1),
    )


def _hardest(
    query: Tensor, hard: Tensor, shared: Tensor, negatives: Negatives, hardest: int
) -> tuple[Tensor, Tensor]:
    """Find the columns (hard, then shared) of the closest rows, closest first, and which are admitted."""
    similarity = torch.cat([torch.einsum("bd,bkd->bk", query, hard.to(query)), query @ shared.to(query).T], 1)
    log_weight = torch.cat([negatives.hard_log_weight, negatives.shared_log_weight], 1)
    similarity = similarity.masked_fill(log_weight == -torch.inf, -torch.inf)
    best, columns = similarity.topk(min(hardest, similarity.shape[1]), dim=1)
    return columns, best > -torch.inf


def _rows_at(columns: Tensor, hard: Tensor, shared: Tensor) -> Tensor:
    """Gather rows ``(b, s, d)`` of columns ``(b, s)``; hard columns come before shared ones."""
    k = hard.shape[1]
    if k == 0:
        return shared[columns]
    from_hard = hard.gather(1, columns.clamp(max=k - 1)[..., None].expand(-1, -1, hard.shape[2]))
    if len(shared) == 0:
        return from_hard
    return torch.where((columns < k)[..., None], from_hard, shared[(columns - k).clamp(min=0)])


def _pick(columns: Tensor, admitted: Tensor, draw: Tensor) -> Tensor:
    """Pick a random admitted column for each uniform number; admitted columns come first."""
    last = (admitted.sum(1, keepdim=True) - 1).clamp(min=0)
    return columns.gather(1, torch.minimum((draw * (last + 1)).long(), last))


def _as_float(rows: Tensor) -> Tensor:
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))


def build(settings: LossSettings, mix_hardest: int, mix_pairs: int, mix_query: int) -> Objective:
    """Build ``mixing`` for a run."""
    seed, count = settings.seed, num_uniforms(mix_pairs, mix_query)

    def inputs(ids: Tensor, step: int) -> dict[str, Any]:
        return {"uniforms": draw(seed, step, ids, STREAM, count)}

    loss = partial(
        mixing,
        temperature=settings.config.temperature,
        hardest=mix_hardest,
        num_pairs=mix_pairs,
        num_query=mix_query,
    )
    return Objective("mixing", loss, inputs)

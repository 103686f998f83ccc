"""Select negatives among candidates: pure functions of candidates, config, step and seed.

Order: own row, age (the retrieval's) -> false_negative -> bounds of similarity -> skip_top -> band -> draw.
Fractions are of the rows admissible for that query, rounded up, and never leave fewer than ``num_hard``
if there are as many, unless ``refill=false``. Filters on similarity may leave fewer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.config import MiningConfig
from memory_bank.draw import noise
from memory_bank.retrieval.base import Candidates
from memory_bank.top import count, largest

UPPER_BOUNDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "max_similarity": torch.full_like,
    "absolute_margin": lambda positive, margin: positive - margin,
    "relative_margin": lambda positive, margin: positive - margin * positive.abs(),
}
"""Settings that bound the similarity of a negative from above.

Setting -> function of the similarities of queries with their own keys, and of the setting's value, that gives
the bound of each query.
"""

FILTERS = ("false_negative", *UPPER_BOUNDS, "min_similarity", "skip_top", "band")
"""Names of all filters, in their order, as in ``Selection.dropped``."""


@dataclass
class Selection:
    """Result of ``select``.

    Attributes:
        slots: Hard negatives, closest first, -1 where there are fewer than ``num_hard``.
        similarity: Their similarities, -inf for -1.
        alike: Slots likely to show the same thing as the query (false_negative), -1 where there are fewer.
        floor: Similarity from which rows count as the same thing; inf where none do.
        dropped: Share of the admissible rows that each filter removed, by its name, averaged over queries.
    """

    slots: Int[Tensor, "b k"]
    similarity: Float[Tensor, "b k"]
    alike: Int[Tensor, "b p"]
    floor: Float[Tensor, " b"]
    dropped: dict[str, Float[Tensor, ""]]


def band_at(config: MiningConfig, step: int) -> tuple[float, float]:
    """Return the band at ``step``: linear to ``band_end`` in ``band_steps`` (Ring, arXiv:2010.02037)."""
    low, high = config.band
    if config.band_end is None:
        return low, high
    done = min(1.0, step / config.band_steps) if config.band_steps else 1.0
    return low + done * (config.band_end[0] - low), high + done * (config.band_end[1] - high)


def skip_top(config: MiningConfig) -> float:
    """Return the fraction of the closest rows to leave out: as set, or ``class_prior``."""
    return config.class_prior if config.skip_top is None else config.skip_top


def depth(config: MiningConfig, rows: int) -> int:
    """Return how many of the closest of ``rows`` rows ``select`` may need, at any step; 0 if none."""
    bands = [config.band] if config.band_end is None else [config.band, config.band_end]
    least = config.num_hard if config.refill else 0
    deepest = max(max(_ceil(high * rows), _ceil(low * rows) + least) for low, high in bands)
    alike = config.false_negative_rank if config.false_negative != "off" else 0
    ranked = _ceil(skip_top(config) * rows) + deepest if config.num_hard else 0
    return min(rows, alike + ranked)


def overruled(config: MiningConfig, rows: int) -> list[str]:
    """Return a line for each setting that others overrule once a query has ``rows`` admissible rows.

    Only ``ranked`` has such. A band of less than one row (mining=hardest) asks for the closest rows, and is
    not among them.
    """
    if config.method != "ranked" or not config.num_hard:
        return []
    lines = []
    skip, most = _ceil(skip_top(config) * rows), max(0, rows - config.num_hard)
    if skip > most and config.refill:
        given = "class_prior" if config.skip_top is None else "skip_top"
        lines.append(
            f"mining.{given}={skip_top(config):g} leaves out the closest {skip} of {rows} rows, "
            f"mining.num_hard={config.num_hard} lowers that to {most}; lower one of them"
        )
    bands = {"band": config.band, "band_end": config.band_end}
    for name, band in bands.items():
        if band is None:
            continue
        low, high = band
        first, last = _ceil(low * rows), _ceil(high * rows)
        most = config.num_hard if config.refill else 1  # without refill as many as the band has are meant
        if last - first >= most or (high * rows < 1 and config.refill):
            continue
        share = min(config.num_hard, rows) / rows
        effect = f"widens it to {share:.1%} of them" if config.refill else "finds none (refill=false)"
        lines.append(
            f"mining.{name}={[low, high]} has {last - first} of {rows} rows, mining.num_hard="
            f"{config.num_hard} {effect}; lower num_hard, or widen the band"
        )
    if config.band_end is not None and not config.band_steps:
        lines.append(
            f"mining.band={config.band} is unused: band_steps=0 moves to band_end={config.band_end} at once; "
            "set mining.band_steps, or leave band_end out"
        )
    return lines


def is_bounded_above(config: MiningConfig) -> bool:
    """Return whether rows above some similarity are dropped."""
    return any(getattr(config, name) is not None for name in UPPER_BOUNDS)


def upper_bounds(config: MiningConfig, positive: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
    """Return the similarities above which a row is dropped, by setting; only of those that are on."""
    set_to = {name: getattr(config, name) for name in UPPER_BOUNDS}
    return {name: UPPER_BOUNDS[name](positive, value) for name, value in set_to.items() if value is not None}


def ceiling(config: MiningConfig, positive: Float[Tensor, " b"]) -> Float[Tensor, " b"] | None:
    """Return the lowest of the upper bounds; None if all are off."""
    bounds = list(upper_bounds(config, positive).values())
    return torch.stack(bounds).amin(0) if bounds else None


def select(
    candidates: Candidates,
    positive: Float[Tensor, " b"],
    ids: Int[Tensor, " b"],
    config: MiningConfig,
    *,
    step: int,
    key: int,
) -> Selection:
    """Draw each query's hard negatives from its candidates.

    Args:
        candidates: Closest first.
        positive: Similarity of each query with its own key.
        ids: Rows of the queries; with ``key`` and a candidate's slot they decide the draw.
        config: Fields of the policy.
        step: For the annealed band.
        key: draw.mix of seed and step.
    """
    alike, over, under = _filtered(candidates, positive, config)
    kept = (candidates.slots >= 0) & ~alike & ~over & ~under
    num_alike, num_over = count(alike), candidates.above + count(over)
    gone = num_alike + num_over
    # Candidates may be missing: an index missed some, or the bound is deeper than the look-up. Then
    # those found count as all there are.
    left = torch.minimum(candidates.rows - gone, count(kept))
    window, num_skipped = _window(candidates, kept, left, config, step)
    slots, similarity = _draw(candidates, window, ids, config.num_hard, key)
    alike_slots, floor = _alike_slots(candidates, alike, config)
    # After a row that is too far, so is every other, also those that the look-up did not reach.
    num_under = torch.where(under.any(1), candidates.rows - gone - left, 0)
    dropped = {
        "false_negative": num_alike,
        **by_bound(num_over, positive, config),
        "min_similarity": num_under,
        "skip_top": num_skipped,
        "band": (candidates.rows - gone - num_under - num_skipped - count(window)).clamp_min(0),
    }
    rows = candidates.rows.clamp_min(1)
    shares = {name: (number / rows).mean() for name, number in dropped.items()}
    return Selection(slots, similarity, alike_slots, floor, shares)


def attract_weight(alike: Int[Tensor, "b p"]) -> Float[Tensor, "b p"]:
    """Return weights of extra positives: at most 1 in all, so that the query's own key has half or more.

    Capped since about 60% of them are wrong even with rank *and* threshold (FNC, arXiv:2011.11765).
    """
    present = (alike >= 0).float()
    return present / present.sum(1, keepdim=True).clamp_min(1)


def contains(
    slots: Int[Tensor, " u"], index: Int[Tensor, "b k"], wanted: Int[Tensor, " m"]
) -> Bool[Tensor, "b m"]:
    """Return whether ``slots[index]`` of each query hold each of ``wanted`` (distinct); -1 is in none."""
    contained = torch.zeros(len(index), len(wanted) + 1, dtype=torch.bool, device=slots.device)
    if len(wanted):
        ordered, order = wanted.sort()
        position = torch.searchsorted(ordered, slots).clamp_max(len(wanted) - 1)
        is_wanted = (ordered[position] == slots) & (slots >= 0)
        contained.scatter_(1, torch.where(is_wanted, order[position], len(wanted))[index], True)
    return contained[:, :-1]


def _ceil(value: float) -> int:
    """Round up, but 0.1 * 30 = 3.0000000000000004 gives 3."""
    return math.ceil(value - 1e-9)


def _fraction(share: float, rows: Tensor) -> Tensor:
    """Return ``_ceil(share * rows)`` for tensors, in float64: float32 is exact only up to 2^24."""
    return (rows.double() * share - 1e-9).ceil().long().clamp_min(0)


def _filtered(
    candidates: Candidates, positive: Tensor, config: MiningConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Mark the candidates that are likely the same thing, those above the ceiling, and those too far."""
    present, similarity = candidates.slots >= 0, candidates.similarity
    over = under = torch.zeros_like(present)
    alike, limit = _alike(candidates, config), ceiling(config, positive)
    if limit is not None:
        over = present & ~alike & (similarity > limit[:, None])
    if config.min_similarity is not None:
        under = present & ~alike & ~over & (similarity < config.min_similarity)
    return alike, over, under


def by_bound(
    num_over: Int[Tensor, " b"], positive: Float[Tensor, " b"], config: MiningConfig
) -> dict[str, Int[Tensor, " b"]]:
    """Assign the rows above the ceiling of each query to the bound that is lowest for it."""
    numbers = dict.fromkeys(UPPER_BOUNDS, torch.zeros_like(num_over))
    bounds = upper_bounds(config, positive)
    if bounds:
        lowest = torch.stack(list(bounds.values())).argmin(0)
        numbers |= {name: torch.where(lowest == at, num_over, 0) for at, name in enumerate(bounds)}
    return numbers


def _alike(candidates: Candidates, config: MiningConfig) -> Tensor:
    """Mark candidates by rank *and* threshold; in a sample, rank r is about rank r / share of the bank."""
    if config.false_negative == "off":
        return torch.zeros_like(candidates.slots, dtype=torch.bool)
    rank = candidates.above[:, None] + torch.arange(candidates.slots.shape[1], device=candidates.slots.device)
    limit = _ceil(config.false_negative_rank * candidates.share)
    return (
        (candidates.slots >= 0) & (rank < limit) & (candidates.similarity > config.false_negative_threshold)
    )


def _alike_slots(candidates: Candidates, alike: Tensor, config: MiningConfig) -> tuple[Tensor, Tensor]:
    if config.false_negative == "off":
        return candidates.slots[:, :0], candidates.similarity.new_full((len(candidates.slots),), torch.inf)
    width = min(config.false_negative_rank, alike.shape[1])
    # Candidates are in order, so those marked come first.
    slots = candidates.slots[:, :width].masked_fill(~alike[:, :width], -1)
    similarity = candidates.similarity.masked_fill(~alike, torch.inf)
    floor = torch.cat([similarity, similarity.new_full((len(similarity), 1), torch.inf)], 1).amin(1)
    return slots, floor


def _window(
    candidates: Candidates,
    kept: Bool[Tensor, "b c"],
    left: Int[Tensor, " b"],
    config: MiningConfig,
    step: int,
) -> tuple[Bool[Tensor, "b c"], Int[Tensor, " b"]]:
    """Mark the candidates to draw from, and count those kept that ``skip_top`` leaves out.

    Args:
        candidates: Closest first.
        kept: Candidates that no filter on similarity removed.
        left: How many rows these filters left.
        config: Fields of the policy.
        step: For the annealed band.
    """
    low, high = band_at(config, step)
    skip, first, last = (_fraction(share, candidates.rows) for share in (skip_top(config), low, high))
    if config.refill:
        skip = torch.minimum(skip, (left - config.num_hard).clamp_min(0))
        last = torch.minimum(torch.maximum(last, first + config.num_hard), left - skip)
        first = torch.minimum(first, (left - skip - config.num_hard).clamp_min(0))
        rank = kept.cumsum(1) - 1
    else:  # ranks of all rows, also of those that were left out for being above the ceiling
        place = torch.arange(kept.shape[1], device=kept.device)
        rank = candidates.above[:, None] + place
    skipped = kept & (rank < skip[:, None])
    window = kept & (rank >= (skip + first)[:, None]) & (rank < (skip + last)[:, None])
    return window, count(skipped)


def _draw(
    candidates: Candidates, window: Tensor, ids: Tensor, number: int, key: int
) -> tuple[Tensor, Tensor]:
    """Draw ``number`` of each query's window uniformly without replacement, in order of similarity."""
    number = min(number, window.shape[1])
    columns = _occupied(window, number)
    slots, similarity, window = (
        candidates.slots[:, columns],
        candidates.similarity[:, columns],
        window[:, columns],
    )
    if window.shape[1] == number and window.device.type == "cpu" and bool(window.all()):
        return slots, similarity  # drawing the sample was the draw; on a GPU this check would be a sync
    chance = noise(slots ^ noise(ids, key)[:, None], key).masked_fill_(~window, -1)
    chosen, column = largest(chance, number)
    column = column.masked_fill(chosen < 0, window.shape[1]).sort(1).values
    missing = column == window.shape[1]
    column = column.clamp_max(max(0, window.shape[1] - 1))
    slots = slots.gather(1, column).masked_fill(missing, -1)
    return slots, similarity.gather(1, column).masked_fill(missing, -torch.inf)


def _occupied(window: Bool[Tensor, "b c"], least: int) -> slice:
    """Return the columns in any query's window, at least ``least``; on a GPU all, as it would be a sync."""
    width = window.shape[1]
    used = window.any(0).nonzero() if window.device.type == "cpu" else window.new_zeros(0)
    if not len(used):
        return slice(0, width)
    first = min(int(used[0]), width - least)
    return slice(first, max(int(used[-1]) + 1, first + least))

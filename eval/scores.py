"""Compute accuracies with intervals, and define what a protocol returns."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_Z = 1.959963984540054  # 97.5% point of the normal distribution


@dataclass(frozen=True)
class Line:
    """One accuracy of a protocol, with its interval.

    Attributes:
        name: E.g. ``top1``, ``top1 k=20``, ``top1 at 10%``.
        value: Accuracy in [0, 1].
        low: Lower end of its 95% interval.
        high: Upper end.
        kind: How the interval was computed, and over what it varies.
        paired: Values whose mean is ``value``, compared one by one with a baseline's: hit or miss of each
            repetition (rows) on each test row (columns), or a value for each identity, in one row.
    """

    name: str
    value: float
    low: float
    high: float
    kind: str
    paired: Float[Tensor, "r m"]


@dataclass(frozen=True)
class Scored:
    """Scores of one set of features.

    Attributes:
        lines: Accuracies, the headline first.
        details: Everything else to save in the result, as JSON values.
        warnings: Reasons to trust the numbers less.
    """

    lines: list[Line]
    details: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def accuracy_line(name: str, correct: Bool[Tensor, "r n"]) -> Line:
    """Return the accuracy over ``r`` repetitions on ``n`` test rows.

    For one repetition the interval is Wilson's, over draws of the test images. Several repetitions, e.g.
    draws of the labels, move the accuracy too: the distance of each end from the mean is then that of
    Wilson's and that of Student's over the repetitions, squares added.
    """
    hits = correct.float().cpu()
    per_run = hits.double().mean(1)
    value = float(per_run.mean())
    low, high = wilson(value * hits.shape[1], hits.shape[1])
    if len(hits) == 1:
        return Line(name, value, low, high, "Wilson, test images", hits)
    seeds = t_reach(per_run)
    low, high = value - math.hypot(value - low, seeds), value + math.hypot(high - value, seeds)
    kind = f"over test images (Wilson) and {len(hits)} seeds (t)"
    return Line(name, value, max(0.0, low), min(1.0, high), kind, hits)


def difference(ours: Line, other: Line) -> dict[str, float]:
    """Return the mean of the paired differences and its 95% interval, over columns and over repetitions.

    The squares of both reaches are added. What images and repetitions do together is then counted twice, so
    the interval is rather too wide than too narrow.

    Where no column differs, values have no spread from which Student's reach could be taken, yet of other
    images some may differ: up to the share of ``unseen_share``. Each of these moves the mean by 1 over the
    number of images at most, all of them perhaps in one direction, so that share is the reach.
    """
    paired = ours.paired.double() - other.paired.double()
    gains = paired.mean(0)
    reach = t_reach(gains) if gains.any() else unseen_share(len(gains))
    if len(paired) > 1:
        reach = math.hypot(reach, t_reach(paired.mean(1)))
    value = float(paired.mean())
    return {"value": value, "low": value - reach, "high": value + reach}


def wilson(hits: float | int, total: int) -> tuple[float, float]:
    """Return the 95% score interval of a proportion (Wilson 1927); it holds near 0 and 1 too.

    Args:
        hits: From 0 to ``total``; a fraction if it is a mean over repetitions.
        total: Number of trials.

    Raises:
        ValueError: no trials.
    """
    if total < 1:
        raise ValueError(f"{hits} hits of {total}: an interval needs 1 trial or more")
    share, z2 = hits / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def unseen_share(total: int) -> float:
    """Return the upper end of the exact 95% interval of a share of which ``total`` trials show no case.

    If the share is p, all trials miss it with probability (1 - p)**total; at the upper end of a two-sided
    interval (Clopper and Pearson 1934) that is 0.025. It is about 3.7 / total.
    """
    return 1 - math.pow(0.025, 1 / total)


def t_interval(values: Float[Tensor, " m"]) -> tuple[float, float]:
    """Return the 95% interval of the mean of independent values; (-inf, inf) for a single value."""
    mean, reach = float(values.mean()), t_reach(values)
    return mean - reach, mean + reach


def t_reach(values: Float[Tensor, " m"]) -> float:
    """Return half of the 95% t interval of the mean of independent values; inf for a single value."""
    if len(values) < 2:
        return math.inf
    from scipy.special import stdtrit  # scipy.stats.t.ppf, which takes 0.6 s to import, this 0.1

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return quantile * float(values.std(correction=1)) / math.sqrt(len(values))


def in_top(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Return whether the right class is among the ``k`` highest; ties are broken by torch's top-k."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(1)


def confusion(
    predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> Int[Tensor, "c c"]:
    """Return the confusion matrix; rows are true classes, columns are predicted ones."""
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(counts: Int[Tensor, "c c"], classes: tuple[str, ...]) -> dict[str, float | None]:
    """Return the accuracy of each class; None for one without test images."""
    hits, totals = counts.diagonal().tolist(), counts.sum(1).tolist()
    return {
        name: hit / total if total else None for name, hit, total in zip(classes, hits, totals, strict=True)
    }

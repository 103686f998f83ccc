"""Measure whether features are healthy: RankMe, alignment, uniformity, spread, and a verdict."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from eval.finite import finite_float32

# Rows whose pairs are compared; 4,096 are 8 million pairs, standard error far below 0.01.
_MOST_ROWS = 4096
# Rows looked up at once.
_ROWS = 1024


@dataclass(frozen=True)
class Health:
    """Statistics of features.

    Attributes:
        rankme: Effective rank, 1 to min(n, d).
        uniformity: 0 (all the same) down to -4 (spread over the sphere).
        std: Mean over dimensions of the standard deviation of unit-norm features, times sqrt(d): about 1
            when spread, 0 when collapsed.
        dead: Share of dimensions that do not vary.
        verdict: ``healthy``, ``dimensional collapse`` or ``complete collapse``.
    """

    rankme: float
    uniformity: float
    std: float
    dead: float
    verdict: str


def health(features: Float[Tensor, "n d"]) -> Health:
    """Compute all statistics of ``features`` (n >= 2) and a verdict.

    ``complete collapse``: unit-norm features spread less than a tenth as far as isotropic ones.
    ``dimensional collapse`` (Jing et al. 2022, arXiv:2110.09348): the effective rank is less than 5% of the
    largest possible.

    Raises:
        UserError: a row is not finite; the functions below raise it too.
    """
    features = finite_float32(features)
    n, d = features.shape
    unit = F.normalize(features)
    std = dimension_std(unit)
    spread, rank = float(std.mean()) * d**0.5, rankme(features)
    verdict = "healthy"
    if rank < 0.05 * min(n, d):
        verdict = "dimensional collapse"
    if spread < 0.1:
        verdict = "complete collapse"
    return Health(rank, uniformity(unit), spread, float((std < 1e-6).double().mean()), verdict)


def rankme(features: Float[Tensor, "n d"], epsilon: float = 1e-7) -> float:
    """Return the effective rank: exp of the entropy of the singular values' shares.

    Garrido et al. 2023 (arXiv:2210.02885), equations 2 and 3, with their epsilon; the mean is not
    subtracted, as in the paper.
    """
    values = torch.linalg.svdvals(finite_float32(features).double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + epsilon
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], alpha: float = 2.0) -> float:
    """Return the mean of distance**alpha over pairs of unit rows (Wang & Isola 2020, arXiv:2005.10242)."""
    first, second = finite_float32(first, "first"), finite_float32(second, "second")
    return float((first - second).norm(dim=1).pow(alpha).mean())


def found_again(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Return for each row of ``first`` whether its own row of ``second`` is closer than every other one.

    Rows are of unit norm. Ties count as not found, so that collapsed features find nothing.
    """
    first, second = finite_float32(first, "first"), finite_float32(second, "second")
    found = []
    for rows in torch.split(torch.arange(len(first), device=first.device), _ROWS):
        similarity = first[rows] @ second.T
        own = similarity.gather(1, rows[:, None])
        others = similarity.scatter(1, rows[:, None], -torch.inf)
        found.append(own[:, 0] > others.amax(1))
    return torch.cat(found)


def uniformity(unit: Float[Tensor, "n d"], t: float = 2.0) -> float:
    """Return the log of the mean Gaussian potential over all pairs of unit rows.

    Wang & Isola 2020 (arXiv:2005.10242). Of more than 4,096 rows, 4,096 evenly spaced ones are used.
    """
    if len(unit) > _MOST_ROWS:
        unit = unit[torch.linspace(0, len(unit) - 1, _MOST_ROWS, device=unit.device).long()]
    squared = torch.pdist(finite_float32(unit).double()).square()
    return float(squared.mul(-t).exp().mean().log())


def dimension_std(features: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Return the standard deviation of each dimension over the rows (divided by n)."""
    return finite_float32(features).std(dim=0, correction=0)

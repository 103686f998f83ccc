"""Draw where in its video each clip begins, before anything is decoded."""

import math

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from contrastive.augment.noise import MANTISSA, uniforms
from contrastive.config import TimeConfig

_STREAM = 3_000
"""Number of the noise that chooses moments; views have small numbers."""


class DrawMoments:
    """Draws the starts and speeds of a row's clips: a pure function of (seed, epoch, row).

    The distance between the starts of two clips is drawn first, then where the earlier begins, and which of
    them is the earlier (the sampling of Qian et al. 2021, arXiv:2008.03800, section 3.2).

    Args:
        time: Distributions.
        seed: In [0, 2**32).
        views: Clips of a row: 2; 1 for training on labels; 3 with one for ``own_negatives=clips``, which
            starts half of the range of possible starts later or earlier than the first.
    """

    def __init__(self, time: TimeConfig, seed: int, views: int = 2) -> None:
        self.time, self.seed, self.views = time, seed, views

    def __call__(
        self, rows: Int[Tensor, " b"], epoch: int
    ) -> tuple[Float64[Tensor, "b v"], Float64[Tensor, "b v"]]:
        """Return where each clip begins, in [0, 1), and its speed, below 0 for one that runs backwards.

        Args:
            rows: Data set rows, on the CPU.
            epoch: From 0.
        """
        numbers = uniforms(self.seed, epoch, rows, _STREAM, 3 + 2 * self.views).double()
        gap, early, order, rest = numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3:]
        starts = early[:, None] if self.views == 1 else self._two(gap, early, order < 0.5)
        if self.views == 3:
            starts = torch.cat([starts, (starts[:, :1] + 0.5) % 1], 1)
        speed, direction = rest.chunk(2, dim=1)
        low, high = (math.log(value) for value in self.time.speed)
        return starts, (low + (high - low) * speed).exp() * torch.where(direction < self.time.reverse, -1, 1)

    def _two(self, gap: Tensor, early: Tensor, in_order: Tensor) -> Tensor:
        # The inverse of the distribution function of density (1 - g) ** decay.
        gap = self.time.max_gap * (1 - gap ** (1 / (1 + self.time.gap_decay)))
        first = early * (1 - gap)
        both = torch.stack((first, first + gap), dim=1).clamp_max(1 - 1 / MANTISSA)
        return torch.where(in_order[:, None], both, both.flip(1))

"""Count the images that could not be read, and stop when there are too many."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.images import Images

_NAMED = 3  # examples in a message
_SURE = 5  # the run stops this many standard errors above the limit, before every row was tried
_LEAST = 10  # unreadable rows needed for that: a smaller count is not normally distributed


class TooManyCorrupt(UserError):
    """More than data.max_corrupt of the images could not be read; the run stops with exit code 3."""


class Tally:
    """Counts distinct rows tried so far and unreadable rows, in the main process of each rank.

    ``report`` only reports rows that this rank could not read. ``count`` enforces the limit, so every rank
    must pass the same rows: then all stop, or none.

    Args:
        images: The data set, for its size and keys.
        limit: data.max_corrupt.
        on_corrupt: Called once for each row that this rank could not read, with the reason.
    """

    def __init__(self, images: Images, limit: float, on_corrupt: Callable[[int, str], None]) -> None:
        self._images, self._limit, self._on_corrupt = images, limit, on_corrupt
        self._tried = torch.zeros(len(images), dtype=torch.bool)
        self._num_tried = 0
        self._reasons: dict[int, str] = {}
        self._bad: set[int] = set()

    def report(self, bad: Mapping[int, str]) -> None:
        """Pass rows that this rank could not read to ``on_corrupt``, with the reason, each row once."""
        for row, reason in bad.items():
            if row not in self._reasons:
                self._reasons[row] = reason
                self._on_corrupt(row, reason)

    def count(self, rows: Int[Tensor, " b"], bad: Collection[int]) -> None:
        """Count distinct rows that were tried, and the unreadable ones among them; enforce the limit.

        Raises:
            UserError: every image was tried and none could be read.
            TooManyCorrupt: more than the limit is unreadable. Before every row was tried, this is raised if
                the count already exceeds the limit for all rows, or its excess cannot be chance.
        """
        self._num_tried += int((~self._tried[rows]).sum())
        self._tried[rows] = True
        self._bad.update(bad)
        if bad:
            self._enforce_limit()

    def _enforce_limit(self) -> None:
        total, tried, bad = len(self._images), self._num_tried, len(self._bad)
        named = "; ".join(
            f"{self._images.key(row)}: {self._reasons.get(row, 'found by another rank')}"
            for row in sorted(self._bad)[:_NAMED]
        )
        if bad == total:
            raise UserError(
                f"none of the {total} {self._images.noun} can be read ({named}); check data.root, "
                f"the files' rights and their format"
            )
        chance = _SURE * math.sqrt(self._limit * (1 - self._limit) * tried)
        certain = bad > self._limit * total
        beyond_chance = bad >= _LEAST and bad > self._limit * tried + chance
        if certain or beyond_chance:
            raise TooManyCorrupt(
                f"{bad} of {tried} {self._images.noun} tried so far (of {total}) could not be read, "
                f"data.max_corrupt={self._limit:g} allows {self._limit:.1%} ({named}); repair or "
                f"remove the files, or raise data.max_corrupt"
            )

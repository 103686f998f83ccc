"""Counting the images that could not be read, and stopping when there are too many."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.images import Images
from memory_bank.shapes import Int

_NAMED = 3  # examples in a message
_SURE = 5  # standard errors above the limit, before every row was seen
_LEAST = 10  # and at least so many bad ones, since the error of a smaller count is not normal


class TooManyCorrupt(UserError):
    """More than data.max_corrupt of the images could not be read; the run stops itself (exit code 3)."""


class Tally:
    """Distinct rows tried so far and those found bad, in the main process of one rank.

    Args:
        images: For their number and keys.
        limit: data.max_corrupt.
        on_corrupt: Told each bad row once, with the reason.
    """

    def __init__(self, images: Images, limit: float, on_corrupt: Callable[[int, str], None]) -> None:
        self._images, self._limit, self._on_corrupt = images, limit, on_corrupt
        self._seen = torch.zeros(len(images), dtype=torch.bool)
        self._num_seen = 0
        self._reasons: dict[int, str] = {}

    def add(self, ids: Int[Tensor, " b"], bad: list[tuple[int, str]]) -> None:
        """Count the rows ``ids``, distinct among themselves, of which ``bad`` (row, reason) were unreadable.

        Raises:
            UserError: every image was tried and none could be read.
            TooManyCorrupt: more than the limit: exactly so once every row was tried; before that, when
                the count alone exceeds it, or chance is ruled out.
        """
        self._num_seen += int((~self._seen[ids]).sum())
        self._seen[ids] = True
        for row, reason in bad:
            if row not in self._reasons:
                self._reasons[row] = reason
                self._on_corrupt(row, reason)
        if bad:
            self._judge()

    def _judge(self) -> None:
        total, seen, bad = len(self._images), self._num_seen, len(self._reasons)
        named = "; ".join(
            f"{self._images.key(row)}: {self._reasons[row]}" for row in list(self._reasons)[:_NAMED]
        )
        if bad == total:
            raise UserError(
                f"none of the {total} images can be read ({named}); check data.root, "
                f"the files' rights and their format"
            )
        chance = _SURE * math.sqrt(self._limit * (1 - self._limit) * seen)
        certain = bad > self._limit * total
        beyond_chance = bad >= _LEAST and bad > self._limit * seen + chance
        if certain or beyond_chance:
            raise TooManyCorrupt(
                f"{bad} of {seen} images tried so far (of {total}) could not be read, "
                f"data.max_corrupt={self._limit:g} allows {self._limit:.1%} ({named}); repair or "
                f"remove the files, or raise data.max_corrupt"
            )

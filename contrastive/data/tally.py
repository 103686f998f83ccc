"""Counting the images that could not be read, and stopping when there are too many."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.images import Images

_NAMED = 3  # examples in a message
_SURE = 5  # standard errors above the limit, before every row was seen
_LEAST = 10  # and at least so many bad ones, since the error of a smaller count is not normal


class TooManyCorrupt(UserError):
    """More than data.max_corrupt of the images could not be read; the run stops itself (exit code 3)."""


class Tally:
    """Distinct rows tried so far and those found bad, in the main process of each rank.

    What one rank alone found is told with ``tell``; ``add`` judges, and must be given the same rows on all
    ranks, so that all of them stop or none.

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
        self._bad: set[int] = set()

    def add(self, ids: Int[Tensor, " b"], bad: list[tuple[int, str]]) -> None:
        """Count the rows ``ids``, distinct among themselves, of which ``bad`` (row, reason) were unreadable.

        Raises:
            UserError: every image was tried and none could be read.
            TooManyCorrupt: more than the limit: exactly so once every row was tried; before that, when
                the count alone exceeds it, or chance is ruled out.
        """
        self._num_seen += int((~self._seen[ids]).sum())
        self._seen[ids] = True
        self.tell(bad)
        self._bad.update(row for row, _ in bad)
        if bad:
            self._judge()

    def tell(self, bad: list[tuple[int, str]]) -> None:
        """Report rows that this rank found unreadable, each once; judges nothing."""
        for row, reason in bad:
            if row not in self._reasons:
                self._reasons[row] = reason
                self._on_corrupt(row, reason)

    def add_global(self, ids: Int[Tensor, " g"], read: Int[Tensor, " r"]) -> None:
        """As ``add``, of the rows that all ranks asked for and those they got; reasons each knows of its own.

        Raises:
            UserError: as ``add``.
            TooManyCorrupt: as ``add``, on all ranks alike.
        """
        self._num_seen += int((~self._seen[ids]).sum())
        self._seen[ids] = True
        bad = ids[~torch.isin(ids, read)].tolist()
        self._bad.update(bad)
        if bad:
            self._judge()

    def _judge(self) -> None:
        total, seen, bad = len(self._images), self._num_seen, len(self._bad)
        named = "; ".join(
            f"{self._images.key(row)}: {self._reasons.get(row, 'found by another rank')}"
            for row in sorted(self._bad)[:_NAMED]
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

"""``data.order=neighbours``: batches of groups of images that are near each other, by the bank's keys.

For methods that take their negatives from the batch: these become hard ones, without a look-up in the step.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from contrastive.config import NeighboursConfig, PretrainConfig
from contrastive.data.images import Images
from contrastive.data.order.base import BankOrder
from contrastive.data.order.global_ import GlobalOrder
from memory_bank.policy import skip_top
from memory_bank.top import largest

Rows = NDArray[np.int64]
Words = NDArray[np.uint64]

# Rows whose neighbourhoods are computed together, and the similarities held at once: 128 MiB of float32.
_CHUNK, _PIECE = 256, 1 << 25
# Probability that a walk returns to its first row; set, not tuned.
_RESTART = 0.2
# Steps of a walk without a free row after which the group is filled up with random ones.
_PATIENCE = 32
# Numbers that set the draws of the walk and of the groups apart from those of the permutation.
_WALK, _GROUPS = 1 << 62, 1 << 63


class NeighbourOrder(BankOrder):
    """Composes an epoch of groups of a row and rows from its neighbourhood, in random order of the groups.

    The neighbourhood of a row are the ranks ``[p, p + m]`` of the known rows by similarity, never the closest
    p: those are mostly the same thing. Each row is in one group. Where a neighbourhood has no free row left,
    random free rows fill the group up, in ``greedy`` never one of the p closest to its first row (unless no
    other row is left). A row without a key is a random one.

    ``greedy`` (after B3, arXiv:2505.11293): a row, in random order, takes random free rows of its own
    neighbourhood. Differs: the ranks are the run's own and not a teacher's, and the groups are greedy
    instead of communities of a graph. ``random_walk`` (BatchSampler, arXiv:2306.03355): from each row on to a
    random one of its neighbourhood, and back to the first with probability 0.2. Differs: rows do not repeat
    within an epoch, and a neighbourhood is exact, not that of a random sample.

    Cost, between two epochs: ``greedy`` compares one row in ``group`` with all, ``random_walk`` each. For
    50,000 keys of 128 numbers in groups of 8, one thread of a CPU takes 2.5 s and 17 s; for 1.28 million it
    would take half an hour and three hours, by extrapolation: such a bank belongs on a GPU.

    Args:
        rows: Images of the training set.
        seed: As run.seed.
        config: The settings.
        skip: Share of the closest rows that are in no neighbourhood.
    """

    reads = frozenset({"mining.skip_top", "mining.class_prior"})

    def __init__(self, rows: int, seed: int, config: NeighboursConfig, skip: float) -> None:
        super().__init__(GlobalOrder(rows, seed))
        self._rows, self._seed, self._config, self._skip = rows, seed, config, skip

    @override
    def compose(self, epoch: int, keys: Float[Tensor, "n d"], known: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
        shuffled: Rows = self._first.ids(epoch, 0, self._rows).numpy()
        near = Neighbourhoods(keys, known, self._skip, self._config.width)
        groups = Groups(shuffled, self._config.group)
        if self._config.kind == "greedy":
            _greedy(groups, near, self._words(epoch))
        else:
            _walk(groups, near, self._stream(epoch))
        return torch.from_numpy(groups.joined(self._words(epoch, _GROUPS)))

    def _words(self, epoch: int, purpose: int = 0) -> Words:
        """Draw a random word for each row; see GlobalOrder for why raw words."""
        words: Words = self._bits(epoch, purpose).random_raw(self._rows)
        return words

    def _stream(self, epoch: int) -> Iterator[int]:
        bits = self._bits(epoch, _WALK)
        while True:
            yield from bits.random_raw(4096).tolist()

    def _bits(self, epoch: int, purpose: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self._seed | purpose, epoch], dtype=np.uint64))


class Neighbourhoods:
    """The ranks of all known rows by their similarity to some rows.

    Args:
        keys: Unit rows.
        known: Rows that have a key.
        skip: Share of the closest known rows before the neighbourhood, rounded up.
        width: Rows of the neighbourhood, m.
    """

    def __init__(
        self, keys: Float[Tensor, "n d"], known: Bool[Tensor, " n"], skip: float, width: int
    ) -> None:
        self._keys, self._known = keys.float(), known
        others = max(0, int(known.sum()) - 1)
        self._first = min(others, int(np.ceil(skip * others - 1e-9)))
        self._last = min(others, self._first + width)

    def of(self, rows: Rows) -> tuple[Rows, Rows]:
        """Return the closest p rows (c, p) and the neighbourhood (c, m) of each of ``rows``.

        Those of a row without a key are -1.
        """
        ids = torch.from_numpy(rows).to(self._keys.device)
        similarity = self._keys[ids] @ self._keys.T
        similarity.masked_fill_(~self._known, -torch.inf)
        similarity[torch.arange(len(ids), device=ids.device), ids] = -torch.inf
        nearest = largest(similarity, self._last)[1].masked_fill(~self._known[ids][:, None], -1).cpu().numpy()
        return nearest[:, : self._first], nearest[:, self._first :]


class Groups:
    """Distribute rows over groups, each row once.

    Args:
        shuffled: All rows in random order; groups begin with the first free ones and are filled up with the
            last free ones.
        size: Rows of a group.
    """

    def __init__(self, shuffled: Rows, size: int) -> None:
        self.size = size
        self.free = np.ones(len(shuffled), dtype=bool)
        self._shuffled, self._begin, self._end = shuffled, 0, len(shuffled)
        self._groups: list[list[int]] = []

    def begin(self) -> Iterator[Rows]:
        """Yield free rows, in random order, in pieces; until none is left."""
        while self._begin < len(self._shuffled):
            piece = self._shuffled[self._begin : self._begin + _chunk(len(self._shuffled))]
            self._begin += len(piece)
            yield piece[self.free[piece]]

    def take(self, group: list[int], row: int) -> None:
        """Move a free row into ``group``."""
        self.free[row] = False
        group.append(row)

    def close(self, group: list[int], apart: Rows) -> None:
        """Fill ``group`` up with random free rows: only if there are no others with rows of ``apart``."""
        put_off = []
        while len(group) < self.size and self._end > 0:
            self._end -= 1
            row = int(self._shuffled[self._end])
            if not self.free[row]:
                continue
            if (apart == row).any():
                put_off.append(self._end)
            else:
                self.take(group, row)
        for place in put_off[: max(0, self.size - len(group))]:
            self.take(group, int(self._shuffled[place]))
        if put_off:  # still free, or behind the end for good
            self._end = max(self._end, put_off[0] + 1)
        self._groups.append(group)

    def joined(self, words: Words) -> Rows:
        """Return the rows group by group, in random order by ``words``; an incomplete group comes last."""
        full = [group for group in self._groups if len(group) == self.size]
        rest = [row for group in self._groups if len(group) < self.size for row in group]
        order = np.argsort(words[: len(full)], kind="stable")
        return np.array([row for at in order for row in full[at]] + rest, dtype=np.int64)


def _greedy(groups: Groups, near: Neighbourhoods, words: Words) -> None:
    for piece in groups.begin():
        for row, closest, ranks in zip(piece.tolist(), *near.of(piece), strict=True):
            if not groups.free[row]:
                continue
            group: list[int] = []
            groups.take(group, row)
            there = ranks[(ranks >= 0) & groups.free[ranks]]
            # Words of both rows, so that each row draws its own order of the same neighbours.
            for at in np.argsort(words[there] ^ words[row], kind="stable")[: groups.size - 1]:
                groups.take(group, int(there[at]))
            groups.close(group, closest)


def _walk(groups: Groups, near: Neighbourhoods, stream: Iterator[int]) -> None:
    table = _table(near, len(groups.free))
    restart = int(_RESTART * 2**32)
    for piece in groups.begin():
        for row in piece.tolist():
            if not groups.free[row]:
                continue
            group: list[int] = []
            groups.take(group, row)
            here, idle = row, 0
            can_walk = table.shape[1] > 0 and table[row, 0] >= 0
            while can_walk and len(group) < groups.size and idle < _PATIENCE:
                word = next(stream)
                here = row if word & 0xFFFFFFFF < restart else here
                here = int(table[here, (word >> 32) % table.shape[1]])
                if groups.free[here]:
                    groups.take(group, here)
                    idle = 0
                else:
                    idle += 1
            groups.close(group, np.empty(0, dtype=np.int64))


def _table(near: Neighbourhoods, rows: int) -> NDArray[np.int32]:
    """Compute the neighbourhood of every row, (rows, m); -1 for a row without a key."""
    chunk = _chunk(rows)
    pieces = (np.arange(start, min(start + chunk, rows)) for start in range(0, rows, chunk))
    return np.concatenate([near.of(piece)[1].astype(np.int32) for piece in pieces])


def _chunk(rows: int) -> int:
    return max(1, min(_CHUNK, _PIECE // rows))


def build(images: Images, config: PretrainConfig) -> NeighbourOrder:
    """Build the order of a run."""
    settings = config.data.neighbours
    skip = skip_top(config.mining) if settings.skip_top is None else settings.skip_top
    return NeighbourOrder(len(images), config.run.seed, settings, skip)

"""Images made of those of another set."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt8
from torch import Tensor

from contrastive.data.decode import Original, Unreadable
from contrastive.data.images import Images


class Wrapped(Images):
    """Images made of those of another set, which names and describes them.

    Nothing that gives pixels is forwarded: a subclass that changes them cannot give the source's by a method
    that it forgot.

    Args:
        source: The other set.
    """

    def __init__(self, source: Images) -> None:
        self.source, self.size, self.frames = source, source.size, source.frames
        self.labels, self.classes = source.labels, source.classes
        self.thread_safe, self.are_videos = source.thread_safe, source.are_videos

    def at(self, row: int) -> int:
        """Return which row of ``source`` a row is made of: that of the same number."""
        return row

    @property
    def white(self) -> int:
        """The source's value."""
        return self.source.white

    @white.setter
    def white(self, value: int) -> None:
        self.source.white = value

    def __len__(self) -> int:
        return len(self.source)

    @abstractmethod
    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """See Images."""

    def key(self, row: int) -> str:
        """Return the source's key."""
        return self.source.key(self.at(row))

    def stamp(self, row: int) -> str:
        """Return the source's stamp."""
        return self.source.stamp(self.at(row))

    def content(self, row: int) -> str:
        """Return the source's content."""
        return self.source.content(self.at(row))

    def version(self, row: int) -> str:
        """Return the source's version."""
        return self.source.version(self.at(row))

    def dimensions(self, row: int) -> tuple[int, int] | None:
        """Return the source's dimensions."""
        return self.source.dimensions(self.at(row))


class SomeImages(Wrapped):
    """A subset of the rows of another set, renumbered from 0 in the given order.

    Args:
        source: The other set.
        rows: Its rows, int64.
    """

    def __init__(self, source: Images, rows: Int[Tensor, " n"]) -> None:
        super().__init__(source)
        self.rows, self.has_originals = rows, source.has_originals
        self.labels = None if source.labels is None else source.labels[rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape

    def at(self, row: int) -> int:
        """Return the row of ``source``."""
        return int(self.rows[row])

    def in_epoch(self, epoch: int) -> "SomeImages":
        """Return the same rows of what training reads of the source in ``epoch``."""
        source = self.source.in_epoch(epoch)
        return self if source is self.source else SomeImages(source, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """See Images."""
        return self.source.read(self.at(row))

    def open(self, row: int) -> Original:
        """Open the source's image."""
        return self.source.open(self.at(row))

    def open_many(self, rows: Sequence[int]) -> Iterator[Original | Unreadable]:
        """Open the source's images."""
        return self.source.open_many(self.rows[list(rows)].tolist())

    def read_into(
        self, pixels: UInt8[Tensor, "b *f 3 s s"] | UInt8[Tensor, "b n"], rows: Sequence[int]
    ) -> dict[int, str]:
        """See Images; the source reads its rows together."""
        theirs = self.rows[list(rows)].tolist()
        bad = self.source.read_into(pixels, theirs)
        return {row: bad[their] for row, their in zip(rows, theirs, strict=True) if their in bad}

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return the source's times."""
        return self.source.times(self.at(row))

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Return the source's frames."""
        return self.source.read_frames(self.at(row), indices)


def stored_at(images: Images, row: int) -> tuple[Images, int]:
    """Return the set that a row of a subset is stored in, and its row there."""
    while isinstance(images, SomeImages):
        row, images = images.at(row), images.source
    return images, row

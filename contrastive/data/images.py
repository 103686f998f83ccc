"""Define what every set of images gives, by the number of a row."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt8
from torch import Tensor

from contrastive.config import WHITE
from contrastive.data.decode import Original, Unreadable, explain_unreadable


class Images(ABC):
    """Map-style data set of square RGB images, or of clips; subclass it to train on your own images.

    Rows are numbered from 0, and a row is always the same image: the memory bank has one slot for each.

    Attributes:
        size: Side s of the images that ``read`` returns.
        labels: Class of each row, -1 where unknown; None without classes. Monitors and evaluation read
            them; the training path does not.
        classes: Names of the classes, or None.
        thread_safe: Whether several threads may read at once.
        frames: Frames of what ``read`` returns, an axis before the others; 0 for images, which lack the axis.
        are_videos: Whether rows are videos, of which training sees other frames than ``read`` returns.
        has_originals: Whether ``open`` gives whole images, for ``data.crop=original``.
        white: Value that is white in grey images of more than 8 bits; who opens a data set sets it to
            ``data.white``.
    """

    size: int
    labels: Int[Tensor, " n"] | None = None
    classes: list[str] | None = None
    thread_safe: bool = True
    frames: int = 0
    are_videos: bool = False
    has_originals: bool = False
    white: int = WHITE

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``read`` returns: (3, s, s), or (frames, 3, s, s) for clips."""
        square = (3, self.size, self.size)
        return (self.frames, *square) if self.frames else square

    @property
    def noun(self) -> str:
        """Word for the rows, for messages: ``images`` or ``videos``."""
        return "videos" if self.are_videos else "images"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """Return the decoded image, or clip.

        Raises:
            Unreadable: it cannot be decoded; the message says why.
        """

    def open(self, row: int) -> Original:
        """Open the whole image, if ``has_originals``; any error but SourceLost makes the row unreadable.

        Raises:
            SourceLost: no row can be read any more.
        """
        raise NotImplementedError(f"{type(self).__name__} has no whole images")

    def open_many(self, rows: Sequence[int]) -> Iterator[Original | Unreadable]:
        """Yield the whole image of each of several rows, in order, or why it is unreadable.

        Raises:
            SourceLost: see ``open``.
        """
        for row in rows:
            try:
                with explain_unreadable():
                    image = self.open(row)
            except Unreadable as error:
                yield error
            else:
                yield image

    def in_epoch(self, epoch: int) -> "Images":
        """Return what training reads in ``epoch``: images are the same in all."""
        return self

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return when each frame of a video is shown, in seconds: an image is one frame, always shown."""
        return np.zeros(1)

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Return some frames of a video, which are all the same for an image.

        Raises:
            Unreadable: they cannot be decoded.
        """
        return self.read(row).expand(len(indices), -1, -1, -1)

    def read_into(
        self, pixels: UInt8[Tensor, "b *f 3 s s"] | UInt8[Tensor, "b n"], rows: Sequence[int]
    ) -> dict[int, str]:
        """Read ``rows`` into ``pixels``; return the reason for each unreadable row (pixels not set)."""
        bad = {}
        for index, row in enumerate(rows):
            try:
                pixels[index] = self.read(row)
            except Unreadable as error:
                bad[row] = str(error)
        return bad

    @abstractmethod
    def key(self, row: int) -> str:
        """Return a readable name of the image: its path relative to the root, or e.g. ``digits/17``."""

    @abstractmethod
    def stamp(self, row: int) -> str:
        """Return a string that a resume compares to detect an altered image, without decoding it.

        The size in bytes of a file, or a hash of pixels in memory.
        """

    def content(self, row: int) -> str:
        """Return a string by which results name the pixels, equal for a copy; by default the stamp."""
        return self.stamp(row)

    def version(self, row: int) -> str:
        """Return a string that differs once the pixels *may* have changed, for caches."""
        return self.content(row)

    def dimensions(self, row: int) -> tuple[int, int] | None:
        """Return width and height of the image before it was cut to a square; None if not known.

        Raises:
            Unreadable: its file cannot be read.
        """
        return None

    def manifest(self) -> Iterator[tuple[int, str, str]]:
        """Yield row, key and stamp of every image, in order: the content of a run's manifest.csv."""
        return ((row, self.key(row), self.stamp(row)) for row in range(len(self)))

    def row_identity_hash(self) -> str:
        """Hash all keys (SHA-256): equal if each row is the same image as before, even if altered."""
        return fingerprint((self.key(row), "") for row in range(len(self)))

    def fingerprint(self) -> str:
        """Hash all keys and contents (SHA-256), and ``white``: equal if the images are equal."""
        rows = ((self.key(row), self.content(row)) for row in range(len(self)))
        return fingerprint(chain(rows, self._scale()))

    def revision(self) -> str:
        """Hash all keys and versions (SHA-256), and ``white``: differs if any image may have changed."""
        rows = ((self.key(row), self.version(row)) for row in range(len(self)))
        return fingerprint(chain(rows, self._scale()))

    def _scale(self) -> list[tuple[str, str]]:
        """Return what hashes of the images add for ``white``: nothing where it is the default."""
        return [] if self.white == WHITE else [("white", str(self.white))]


def fingerprint(rows: Iterable[tuple[str, str]]) -> str:
    """Hash (key, stamp) pairs in order: SHA-256, in hex."""
    digest = hashlib.sha256()
    for key, stamp in rows:
        digest.update(f"{key}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def spread_rows(total: int, most: int) -> Int[Tensor, " m"]:
    """Return up to ``most`` of ``total`` rows, int64, evenly spread from the first to the last.

    Computed in float64: float32 has no odd numbers above 2^24, so the last row might not exist.
    """
    return torch.linspace(0, total - 1, min(most, total), dtype=torch.float64).long()


def read_or_none(images: Images, row: int) -> Tensor | None:
    """Read an image; None where there is no such row, or it cannot be read."""
    if not 0 <= row < len(images):
        return None
    try:
        return images.read(row)
    except Unreadable:
        return None

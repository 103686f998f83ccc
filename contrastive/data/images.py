"""A numbered collection of images: files on disk, or arrays in memory."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from contrastive.data.decode import Unreadable, read_file, to_rgb, to_square, to_tensor


class Images(ABC):
    """Map-style data set of square RGB images; subclass it to train on your own.

    Rows are numbered from 0 and keep their number for good: the memory bank has one slot for each.

    Attributes:
        size: Side s of what ``read`` returns.
        labels: Class of each row, -1 where unknown; None without classes. Monitors and evaluation look
            labels up here; the training path never does.
        classes: Names of the classes, or None.
        thread_safe: Whether several threads may read at once.
    """

    size: int
    labels: Int[Tensor, " n"] | None = None
    classes: list[str] | None = None
    thread_safe: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """The decoded image.

        Raises:
            Unreadable: it cannot be decoded; the message says why.
        """

    def read_into(self, pixels: UInt8[Tensor, "b 3 s s"], rows: Sequence[int]) -> list[tuple[int, str]]:
        """Read ``rows`` into ``pixels``; returns the unreadable ones, with the reason and without pixels."""
        bad = []
        for place, row in enumerate(rows):
            try:
                pixels[place] = self.read(row)
            except Unreadable as error:
                bad.append((row, str(error)))
        return bad

    @abstractmethod
    def key(self, row: int) -> str:
        """What a person finds the image by: its path relative to the root, or e.g. ``digits/17``."""

    @abstractmethod
    def stamp(self, row: int) -> str:
        """What changes when the image does: size in bytes of a file, a hash of pixels in memory."""

    def manifest(self) -> Iterator[tuple[int, str, str]]:
        """Row, key and stamp of every image, in order."""
        return ((row, self.key(row), self.stamp(row)) for row in range(len(self)))

    def numbering(self) -> str:
        """SHA-256 over all keys: equal if each row is of the same image as before, altered or not."""
        return fingerprint((self.key(row), "") for row in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over all keys and stamps: equal if the images are."""
        return fingerprint((key, stamp) for _, key, stamp in self.manifest())

    def revision(self) -> str:
        """As the fingerprint, but different as soon as an image *may* have changed."""
        return self.fingerprint()


def fingerprint(rows: Iterable[tuple[str, str]]) -> str:
    """SHA-256, in hex, over (key, stamp) pairs in order."""
    digest = hashlib.sha256()
    for key, stamp in rows:
        digest.update(f"{key}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def printable(name: bytes) -> str:
    r"""A file's name that any log can take, different for each name.

    What is not UTF-8 or not printable appears as ``\xNN``, ``\n`` and the like, a backslash as two.
    """
    text = name.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FileImages(Images):
    """Image files below one root, decoded when read.

    Args:
        root: Folder that keys are relative to.
        keys: Relative paths as the file system's bytes, with ``/``; their order is the row order.
        size: Side of the decoded square.
        labels: Class of each key, or None.
        classes: Names of the classes, or None.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        keys: list[bytes],
        size: int,
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.root, self.size, self.labels, self.classes = (
            os.fsencode(os.path.abspath(root)),
            size,
            labels,
            classes,
        )
        # One buffer instead of a million strings: half the memory, and none of it is copied into every
        # forked worker, as reference counts would make happen.
        self._ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self._text = np.frombuffer(b"".join(keys), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, row: int) -> bytes:
        """Absolute path of the file."""
        return os.path.join(self.root, self._raw(row))

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        return read_file(self.path(row), self.size)

    def key(self, row: int) -> str:
        """Relative path, as ``printable`` has it."""
        return printable(self._raw(row))

    def stamp(self, row: int) -> str:
        """Size in bytes, or ``unreadable``."""
        try:
            return str(os.stat(self.path(row)).st_size)
        except OSError:
            return "unreadable"

    def revision(self) -> str:
        """See Images: with the times the files were written, since a bitmap may change and keep its size."""
        return fingerprint((self.key(row), self._size_and_time(row)) for row in range(len(self)))

    def _size_and_time(self, row: int) -> str:
        try:
            status = os.stat(self.path(row))
        except OSError:
            return "unreadable"
        return f"{status.st_size} {status.st_mtime_ns}"

    def _raw(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: there are {len(self)} images")
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].tobytes()


class ArrayImages(Images):
    """Images held as one array (or a memory map, or several) of equal sizes.

    Args:
        name: Keys are ``name/row number in the source``.
        arrays: uint8 arrays of (n, h, w, 3); their rows follow each other.
        size: Side of what ``read`` returns; others are resized.
        rows: Rows of the arrays that make up this set, in order; None takes all.
        labels: Class of each row of this set, or None.
        classes: Names of the classes, or None.
    """

    def __init__(
        self,
        name: str,
        arrays: list[np.ndarray[Any, np.dtype[np.uint8]]],
        size: int,
        *,
        rows: np.ndarray[Any, np.dtype[np.int64]] | None = None,
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.name, self.size, self.labels, self.classes = name, size, labels, classes
        self._arrays = arrays
        self._starts = np.cumsum([0] + [len(array) for array in arrays])
        self._rows = np.arange(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images; never Unreadable."""
        return _square(self._pixels(row), self.size)

    def key(self, row: int) -> str:
        """E.g. ``digits/17``."""
        return f"{self.name}/{self._rows[row]}"

    def stamp(self, row: int) -> str:
        """Hash of the pixels, 64 bits in hex."""
        return hashlib.sha256(np.ascontiguousarray(self._pixels(row)).tobytes()).hexdigest()[:16]

    def _pixels(self, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        source = self._rows[row]
        part = int(np.searchsorted(self._starts, source, side="right")) - 1
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = self._arrays[part][source - self._starts[part]]
        return pixels


class DatasetImages(Images):
    """A map-style Dataset of your own: ``dataset[i]`` is a PIL image or a uint8 (3, h, w) tensor.

    A tuple is taken for (image, label, ...) and its first item used. Whatever ``dataset[i]`` raises makes
    that row unreadable.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        size: Side of what ``read`` returns.
        name: Keys are ``name/row``.
        labels: Class of each row for monitors and evaluation, or None.
        classes: Names of the classes, or None.
    """

    thread_safe = False  # a Dataset need not be: torch reads it from processes

    def __init__(
        self,
        dataset: Any,
        size: int,
        *,
        name: str = "dataset",
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.dataset, self.size, self.name = dataset, size, name
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        try:
            item = self.dataset[row]
        except Exception as error:  # the user's code; whatever it raises concerns this row alone
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            return _square(image.permute(1, 2, 0).numpy(), self.size)
        if isinstance(image, Image.Image):
            return to_tensor(to_square(to_rgb(image), self.size))
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{self.name}[{row}] is {given}: a PIL image or a uint8 (3, h, w) tensor is needed")

    def key(self, row: int) -> str:
        """E.g. ``dataset/17``."""
        return f"{self.name}/{row}"

    def stamp(self, row: int) -> str:
        """Hash of the pixels as read (so the fingerprint decodes every image once)."""
        try:
            return hashlib.sha256(self.read(row).numpy().tobytes()).hexdigest()[:16]
        except Unreadable:
            return "unreadable"


class SomeImages(Images):
    """Some rows of another set, renumbered from 0 in the order given.

    Args:
        images: The other set.
        rows: Its rows, int64.
    """

    def __init__(self, images: Images, rows: Int[Tensor, " n"]) -> None:
        self.images, self.rows = images, rows
        self.size, self.classes, self.thread_safe = images.size, images.classes, images.thread_safe
        self.labels = None if images.labels is None else images.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        return self.images.read(int(self.rows[row]))

    def key(self, row: int) -> str:
        """As the other set has it."""
        return self.images.key(int(self.rows[row]))

    def stamp(self, row: int) -> str:
        """As the other set has it."""
        return self.images.stamp(int(self.rows[row]))


def _square(pixels: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> UInt8[Tensor, "3 s s"]:
    if pixels.shape[:2] == (size, size):
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return to_tensor(to_square(Image.fromarray(np.ascontiguousarray(pixels)), size))

"""Map-style image collections: files on disk, arrays in memory, or your own torch Dataset."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt8
from PIL import Image
from torch import Tensor

from contrastive.config import WHITE, UserError
from contrastive.data.decode import (
    Encoded,
    Original,
    Unreadable,
    decode_file,
    explain_unreadable,
    read_dimensions,
    to_rgb,
    to_square,
    to_tensor,
)


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


def printable(name: bytes) -> str:
    r"""Escape a file's name so that it can be written to any log; different names stay different.

    Bytes that are not UTF-8 or not printable become ``\xNN``, ``\n`` and the like, a backslash becomes two.
    """
    text = name.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EncodedImages(Images):
    """Images that are stored as files of any format, wherever these are: on a disk, in a shard, in a table.

    A subclass says how a row's file is opened; decoding, and what is unreadable, is the same for all.
    """

    has_originals = True

    @abstractmethod
    def open(self, row: int) -> Encoded:
        """Open the encoded image; see Images."""

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        with explain_unreadable(), self.open(row) as file:
            return decode_file(file, self.size, self.white)

    def dimensions(self, row: int) -> tuple[int, int]:
        """Return width and height by the file's header."""
        with explain_unreadable(), self.open(row) as file:
            return read_dimensions(file)


class BatchedImages(EncodedImages):
    """Encoded images in a place where asking for many rows at once is faster."""

    @abstractmethod
    def open_many(self, rows: Sequence[int]) -> Iterator[Encoded | Unreadable]:
        """See Images."""

    def open(self, row: int) -> Encoded:
        """See EncodedImages."""
        (file,) = self.open_many([row])
        if isinstance(file, Unreadable):
            raise file
        return file

    def read_into(self, pixels: UInt8[Tensor, "b 3 s s"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; opens the rows together."""
        bad = {}
        for index, file in enumerate(self.open_many(rows)):
            try:
                if isinstance(file, Unreadable):
                    raise file
                with file:
                    pixels[index] = decode_file(file, self.size, self.white)
            except Unreadable as error:
                bad[rows[index]] = str(error)
        return bad


class Names:
    """Names by number, held in one buffer.

    Half the memory of a million strings, and forked workers share it; writing the strings' reference counts
    would copy their pages into each worker.

    Args:
        text: All names, one after the other.
        ends: Where each ends in ``text``.
    """

    def __init__(self, text: np.ndarray[Any, np.dtype[np.uint8]], ends: np.ndarray[Any, np.dtype[np.int64]]):
        self.text, self.ends = text, ends

    @staticmethod
    def of(names: Sequence[bytes]) -> "Names":
        """Pack a list."""
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Names(np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number}: there are {len(self)} images")
        start = self.ends[number - 1] if number else 0
        return self.text[start : self.ends[number]].tobytes()


class FileImages(EncodedImages):
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
        self._keys = Names.of(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def path(self, row: int) -> bytes:
        """Return the absolute path of the file."""
        return os.path.join(self.root, self._keys[row])

    def open(self, row: int) -> Encoded:
        """See EncodedImages."""
        return open(self.path(row), "rb")

    def key(self, row: int) -> str:
        """Return the relative path, escaped by ``printable``."""
        return printable(self._keys[row])

    def stamp(self, row: int) -> str:
        """Return the size in bytes, or ``unreadable``."""
        try:
            return str(os.stat(self.path(row)).st_size)
        except OSError:
            return "unreadable"

    def version(self, row: int) -> str:
        """Return the size and the time of writing, since a bitmap may change without changing its size."""
        try:
            status = os.stat(self.path(row))
        except OSError:
            return "unreadable"
        return f"{status.st_size} {status.st_mtime_ns}"


class ArrayImages(Images):
    """Images stored in one or several arrays or memory maps, all of one size.

    Args:
        name: Keys are ``name/row number in the source``.
        arrays: uint8 arrays of (n, h, w, 3), concatenated in this order.
        size: Side of the images that ``read`` returns; other sizes are resized.
        rows: Rows of the arrays that make up this set, in order; None takes all.
        labels: Class of each row of this set, or None.
        classes: Names of the classes, or None.
    """

    has_originals = True

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

    def open(self, row: int) -> Image.Image:
        """See Images."""
        return Image.fromarray(np.ascontiguousarray(self._pixels(row)))

    def key(self, row: int) -> str:
        """Return e.g. ``digits/17``."""
        return f"{self.name}/{self._rows[row]}"

    def stamp(self, row: int) -> str:
        """Hash the pixels, to 64 bits in hex."""
        return _hash(np.ascontiguousarray(self._pixels(row)))

    def dimensions(self, row: int) -> tuple[int, int]:
        """Return width and height of the stored array."""
        height, width = self._pixels(row).shape[:2]
        return width, height

    def _pixels(self, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        source = self._rows[row]
        part = int(np.searchsorted(self._starts, source, side="right")) - 1
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = self._arrays[part][source - self._starts[part]]
        return pixels


class DecodedImages(Images):
    """Images or clips that were decoded before, in memory.

    Args:
        name: Keys are ``name/row``.
        pixels: The decoded images, in the order of the rows.
        labels: Class of each row, or None.
        classes: Names of the classes, or None.
    """

    def __init__(
        self,
        name: str,
        pixels: UInt8[Tensor, "n *f 3 s s"],
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.name, self.pixels, self.labels, self.classes = name, pixels, labels, classes
        self.are_videos = pixels.ndim == 5
        self.size, self.frames = pixels.shape[-1], pixels.shape[1] if self.are_videos else 0

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """See Images; never Unreadable."""
        return self.pixels[row]

    def key(self, row: int) -> str:
        """Return e.g. ``train/17``."""
        return f"{self.name}/{row}"

    def stamp(self, row: int) -> str:
        """Hash the pixels, to 64 bits in hex."""
        return _hash(self.pixels[row].numpy())


class DatasetImages(Images):
    """A map-style Dataset of your own: ``dataset[i]`` is a PIL image or a uint8 (3, h, w) tensor.

    Of a tuple (image, label, ...) the first item is used. If ``dataset[i]`` raises, that row counts as
    unreadable.

    A resume is refused if the number of rows differs. Altered images are detected too if the dataset has a
    method ``stamp(row)`` that returns a string which changes with the image (a file's size, a hash). Caches
    of features and of decoded images then use it as well; without it they decode every image to hash it.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        size: Side of the images that ``read`` returns.
        name: Keys are ``name/row``.
        labels: Class of each row for monitors and evaluation, -1 where unknown; None without classes.
        classes: Names of the classes; None numbers them.

    Raises:
        UserError: the number of labels differs from the number of rows.
    """

    thread_safe = False  # a Dataset need not be: torch reads it from processes
    has_originals = True

    def __init__(
        self,
        dataset: Any,
        size: int,
        *,
        name: str = "dataset",
        labels: Sequence[int] | Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.dataset, self.size, self.name, self.classes = dataset, size, name, classes
        if labels is None:
            return
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if len(self.labels) != len(dataset):
            raise UserError(
                f"labels: {len(self.labels)} for {len(dataset)} images; give one a row, -1 where unknown"
            )
        if classes is None:
            self.classes = [str(number) for number in range(max([-1, *self.labels.tolist()]) + 1)]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        return to_tensor(to_square(to_rgb(self.open(row), self.white), self.size))

    def open(self, row: int) -> Image.Image:
        """See Images."""
        try:
            item = self.dataset[row]
        except Exception as error:  # the user's code; whatever it raises concerns this row alone
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        if isinstance(image, Image.Image):
            if not (image.width and image.height):
                raise Unreadable(f"no pixels ({image.width}x{image.height})")
            return image
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{self.name}[{row}] is {given}: a PIL image or a uint8 (3, h, w) tensor is needed")

    def key(self, row: int) -> str:
        """Return e.g. ``dataset/17``."""
        return f"{self.name}/{row}"

    def stamp(self, row: int) -> str:
        """Return the dataset's own stamp, or nothing if it has none."""
        return str(self.dataset.stamp(row)) if self._has_stamps else ""

    def content(self, row: int) -> str:
        """Return the dataset's own stamp, or a hash of the decoded pixels."""
        if self._has_stamps:
            return self.stamp(row)
        try:
            return _hash(self.read(row).numpy())
        except Unreadable:
            return "unreadable"

    @property
    def _has_stamps(self) -> bool:
        return callable(getattr(self.dataset, "stamp", None))


class SomeImages(Images):
    """A subset of the rows of another set, renumbered from 0 in the given order.

    Args:
        images: The other set.
        rows: Its rows, int64.
    """

    def __init__(self, images: Images, rows: Int[Tensor, " n"]) -> None:
        self.images, self.rows = images, rows
        self.size, self.classes, self.thread_safe = images.size, images.classes, images.thread_safe
        self.frames, self.has_originals = images.frames, images.has_originals
        self.are_videos = images.are_videos
        self.labels = None if images.labels is None else images.labels[rows]

    @property
    def white(self) -> int:
        """The other set's value."""
        return self.images.white

    @white.setter
    def white(self, value: int) -> None:
        self.images.white = value

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """See Images."""
        return self.images.read(int(self.rows[row]))

    def open(self, row: int) -> Original:
        """Open the other set's image."""
        return self.images.open(int(self.rows[row]))

    def open_many(self, rows: Sequence[int]) -> Iterator[Original | Unreadable]:
        """Open the other set's images."""
        return self.images.open_many(self.rows[list(rows)].tolist())

    def read_into(
        self, pixels: UInt8[Tensor, "b *f 3 s s"] | UInt8[Tensor, "b n"], rows: Sequence[int]
    ) -> dict[int, str]:
        """See Images; the other set reads its rows together."""
        theirs = self.rows[list(rows)].tolist()
        bad = self.images.read_into(pixels, theirs)
        return {row: bad[their] for row, their in zip(rows, theirs, strict=True) if their in bad}

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return the other set's times."""
        return self.images.times(int(self.rows[row]))

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Return the other set's frames."""
        return self.images.read_frames(int(self.rows[row]), indices)

    def key(self, row: int) -> str:
        """Return the other set's key."""
        return self.images.key(int(self.rows[row]))

    def stamp(self, row: int) -> str:
        """Return the other set's stamp."""
        return self.images.stamp(int(self.rows[row]))

    def content(self, row: int) -> str:
        """Return the other set's content."""
        return self.images.content(int(self.rows[row]))

    def version(self, row: int) -> str:
        """Return the other set's version."""
        return self.images.version(int(self.rows[row]))

    def dimensions(self, row: int) -> tuple[int, int] | None:
        """Return the other set's dimensions."""
        return self.images.dimensions(int(self.rows[row]))


def stored_at(images: Images, row: int) -> tuple[Images, int]:
    """Return the set that a row of a subset is stored in, and its row there."""
    while isinstance(images, SomeImages):
        row, images = int(images.rows[row]), images.images
    return images, row


def _square(pixels: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> UInt8[Tensor, "3 s s"]:
    if pixels.shape[:2] == (size, size):
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return to_tensor(to_square(Image.fromarray(np.ascontiguousarray(pixels)), size))


def _hash(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]

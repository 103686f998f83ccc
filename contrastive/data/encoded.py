"""Images stored as files of any format, wherever these are, and those on a disk."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from jaxtyping import Int, UInt8
from torch import Tensor

from contrastive.data.decode import Encoded, Unreadable, decode_file, explain_unreadable, read_dimensions
from contrastive.data.images import Images
from contrastive.data.names import Names, printable


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
        self.root = os.fsencode(os.path.abspath(root))
        self.size, self.labels, self.classes = size, labels, classes
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
        return written(self.path(row)).partition(" ")[0]

    def version(self, row: int) -> str:
        """See ``written``."""
        return written(self.path(row))


def written(path: str | bytes) -> str:
    """Return a file's size and time of writing, since a bitmap may change without changing its size.

    ``unreadable`` if there is no such file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return "unreadable"
    return f"{status.st_size} {status.st_mtime_ns}"

"""Names of files, as the file system has them: many in little memory, and for a log."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def printable(name: bytes) -> str:
    r"""Escape a file's name so that it can be written to any log; different names stay different.

    Bytes that are not UTF-8 or not printable become ``\xNN``, ``\n`` and the like, a backslash becomes two.
    """
    text = name.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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

"""Images in memory: arrays of pixels, and images that were decoded before."""

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from contrastive.data.decode import to_square, to_tensor
from contrastive.data.images import Images


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
        return hash_pixels(np.ascontiguousarray(self._pixels(row)))

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
        return hash_pixels(self.pixels[row].numpy())


def hash_pixels(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Hash pixels (SHA-256), to 64 bits in hex."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def _square(pixels: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> UInt8[Tensor, "3 s s"]:
    if pixels.shape[:2] == (size, size):
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return to_tensor(to_square(Image.fromarray(np.ascontiguousarray(pixels)), size))

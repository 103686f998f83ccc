"""Cache decoded images on disk, so that files are not decoded in every epoch of every run."""

import importlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from contrastive.config import UserError
from contrastive.data.decode import Unreadable
from contrastive.data.images import Images
from contrastive.data.reading import decode_blocks, num_bytes
from contrastive.data.wrapped import Wrapped

logger = logging.getLogger(__name__)
fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

_FORMAT = 1  # increase it when contrastive/data/decode.py decodes a file to other pixels


class CachedImages(Wrapped):
    """The images of ``source``, read from a memory-mapped uint8 array (n, 3, s, s).

    All processes of a machine share its pages, and the system reclaims them when memory is needed.

    Args:
        source: The original images, for keys, stamps and labels.
        path: The array, a ``.npy`` file.
        unreadable: Reason for each row that could not be decoded.
    """

    def __init__(self, source: Images, path: Path, unreadable: dict[int, str]) -> None:
        super().__init__(source)
        self._path, self._unreadable, self.thread_safe = path, unreadable, True

    def __getstate__(self) -> dict[str, Any]:
        # Pickling for a spawned worker would copy the array into memory.
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    @cached_property
    def _pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return pixels

    def read(self, row: int) -> UInt8[torch.Tensor, "3 s s"]:
        """See Images."""
        pixels = torch.empty(1, 3, self.size, self.size, dtype=torch.uint8)
        for reason in self.read_into(pixels, [row]).values():
            raise Unreadable(reason)
        return pixels[0]

    def read_into(self, pixels: UInt8[torch.Tensor, "b 3 s s"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; gathers all rows at once."""
        # Rows are in range; mode="raise" would go through a buffer.
        np.take(self._pixels, rows, axis=0, out=pixels.numpy(), mode="clip")
        return {row: self._unreadable[row] for row in rows if row in self._unreadable}


def cached(images: Images, folder: Path, *, progress: bool = False) -> CachedImages:
    """Read ``images`` from a decoded array below ``folder``; if it is missing, decode them into it first.

    Its name is a hash of all keys, sizes and times of the files, and the side of the decoded square: images
    that change get another array, so nothing stale is ever read, and old ones may be deleted at any time.
    One process decodes, others wait for it. The array is renamed to its final name last, so that the partial
    file of a killed process is never read. An array that is truncated or has another shape is decoded again,
    with a warning; altered pixels are not detected, since that would read all of them at every start.

    Args:
        images: Images that are slow to read.
        folder: Created if missing; may be shared by runs, and by machines that see one file system.
        progress: Show a bar on stderr while decoding.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = folder / f"{images.revision()[:32]}-{images.size}px-v{_FORMAT}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unreadable = _check(path, images)
        if unreadable is None:
            with _alone(path.with_suffix(".lock")):
                unreadable = _check(path, images)  # another process may have written it meanwhile
                if unreadable is None:
                    if path.exists():
                        logger.warning("%s, or the .json beside it, is damaged: decoded again", path)
                    unreadable = _decode_to(path, images, progress)
    except OSError as error:
        raise UserError(
            f"data.cache={folder}: {error.strerror or error}; it needs {num_bytes(images) / 2**30:.1f} GiB "
            "that can be written; choose another folder, or data.cache=null"
        ) from error
    return CachedImages(images, path, unreadable)


def _check(path: Path, images: Images) -> dict[int, str] | None:
    """Check the array; return its unreadable rows with reasons, None if it is missing or malformed."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0(file)
            num_pixels = path.stat().st_size - file.tell()
        reasons = json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # parsers raise a dozen types on damaged bytes
        return None
    if header != (_shape(images), False, np.dtype(np.uint8)) or num_pixels != num_bytes(images):
        return None
    if not isinstance(reasons, dict) or not all(map(str.isdecimal, reasons)):
        return None
    return {int(row): str(reason) for row, reason in reasons.items()}


def _shape(images: Images) -> tuple[int, ...]:
    return len(images), *images.shape


def _decode_to(path: Path, images: Images, progress: bool) -> dict[int, str]:
    """Write the array, and beside it the reason for each unreadable row; return the reasons."""
    logger.info("decoding %d images into %s, once", len(images), path)
    unreadable: dict[int, str] = {}
    partial = path.with_suffix(".partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": _shape(images)}
    # Written, not mapped: a full disk then raises; storing into a mapped page would kill the process.
    with partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in decode_blocks(images, progress=progress):
            file.write(block.images.numpy().data)
            unreadable |= block.bad
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".json").write_text(json.dumps(unreadable))
    os.replace(partial, path)
    return unreadable


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock out other processes; the lock ends when this process ends."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield

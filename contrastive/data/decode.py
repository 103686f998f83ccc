"""Decode an image file to a square of RGB bytes, or raise Unreadable with the reason."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from contrastive.config import WHITE, UserError

DARK = 32
"""Value, of 255, that nearly black images reach nowhere: one eighth of white, as 13 of 16 bits are."""

_ORIENTATION = 0x0112  # EXIF tag
# The transpose that undoes each EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))


Encoded = BufferedReader | BytesIO
"""An image's bytes before they are decoded, open for reading."""

Original = Encoded | Image.Image
"""A whole image, before it is cut to a square."""


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason, one line."""


class SourceLost(UserError):
    """The place of the images cannot be reached, so no row can be read; a run stops with exit code 3."""


@contextmanager
def explain_unreadable() -> Iterator[None]:
    """Turn whatever an image raises while it is opened and decoded into Unreadable, but for SourceLost."""
    try:
        yield
    except (Unreadable, SourceLost):
        raise
    except Exception as error:  # decoders raise over a dozen types on damaged input; each means the same
        raise Unreadable(why_unreadable(error)) from error


def decode_file(file: Encoded, size: int, white: int = WHITE) -> UInt8[Tensor, "3 s s"]:
    """Decode an open image file to a centred RGB square of side ``size``.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is composited on white; the EXIF
    orientation is applied; the first frame of an animation is used.

    Args:
        file: The file.
        size: Side of the square.
        white: Value that is white in grey files of more than 8 bits, see ``data.white``.

    Raises:
        Unreadable: not an image, damaged, truncated, empty, without pixels, too many pixels
            (``PIL.Image.MAX_IMAGE_PIXELS``), no agreed value range (32-bit).
    """
    with explain_unreadable(), open_image(file) as (image, turn):
        # JPEG can decode at 1/2, 1/4 or 1/8; not below twice the target, for the final filter.
        image.draft(None, (2 * size, 2 * size))
        rgb = to_rgb(image, white)
    square = to_square(rgb, size)
    return to_tensor(square if turn is None else square.transpose(turn))


@contextmanager
def open_image(file: Encoded) -> Iterator[tuple[Image.Image, Image.Transpose | None]]:
    """Read the header of an open image file; yield the image, and the turn that makes it upright.

    Raises:
        Unreadable: empty, without pixels, too many pixels.
    """
    if not file.seek(0, os.SEEK_END):
        raise Unreadable("empty file")
    file.seek(0)
    with Image.open(file) as image:
        _check_size(image)
        yield image, _UPRIGHT.get(_orientation(image))


def read_file(path: str | bytes | Path, size: int, white: int = WHITE) -> UInt8[Tensor, "3 s s"]:
    """Decode an image file as ``decode_file`` does.

    Raises:
        Unreadable: see ``decode_file``; also no permission to read, or no such file.
    """
    with explain_unreadable(), open(path, "rb") as file:
        return decode_file(file, size, white)


def read_dimensions(file: Encoded) -> tuple[int, int]:
    """Return width and height of an open image file, upright, without decoding it.

    Raises:
        Unreadable: not an image.
    """
    with explain_unreadable(), Image.open(file) as image:
        return upright_size(image, _UPRIGHT.get(_orientation(image)))


def upright_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """Return width and height of the image after ``turn``."""
    return (image.height, image.width) if turn in _SIDEWAYS else image.size


def to_rgb(image: Image.Image, white: int = WHITE) -> Image.Image:
    """Convert any PIL image to 8-bit RGB; transparency on white, of 16-bit values ``white`` becomes 255.

    Raises:
        Unreadable: 32-bit pixels, which have no agreed range.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = deep_values(image)
        scaled = (255 * np.minimum(values, white) + white // 2) // white
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if has_alpha(image):
        # Dropping alpha would show the arbitrary colours of transparent pixels.
        overlay = image.convert("RGBA")
        below = Image.new("RGBA", overlay.size, (255, 255, 255, 255))
        return Image.alpha_composite(below, overlay).convert("RGB")
    return image.convert("RGB")  # loads the pixels, even if the mode is already RGB


def has_alpha(image: Image.Image) -> bool:
    """Return whether the image has transparency."""
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` (bilinear, antialiased) and crop the centre, in one pass."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Convert an RGB image to contiguous uint8 planes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def ignore_warnings() -> None:
    """Ignore PIL's warnings about odd files, one line per file; call it once in each process.

    Not in ``decode_file``: warning filters are per process, and threads would undo each other's.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_size(image: Image.Image) -> None:
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if pixels == 0:
        raise Unreadable(f"no pixels ({image.width}x{image.height})")
    # PIL itself warns at its limit and refuses at twice that; the result must not depend on -W flags.
    if limit is not None and pixels > limit:
        raise Unreadable(f"{image.width}x{image.height} pixels, more than the limit of {limit}")


def deep_values(image: Image.Image) -> npt.NDArray[np.int64]:
    """Return the values of 16-bit grey, which PIL opens as ``I;16`` or (older versions) ``I``.

    Raises:
        Unreadable: 32-bit pixels, which have no agreed range.
    """
    if image.mode == "F":
        raise Unreadable("32-bit float pixels have no agreed range; save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > WHITE:
        raise Unreadable("32-bit integer pixels have no agreed range; save it with 8 or 16 bits")
    return values


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block, for which PIL raises many types, says nothing about the pixels
        return 1


def why_unreadable(error: Exception) -> str:
    """Describe in one line why an image could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

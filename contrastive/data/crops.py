"""Cut the views of an image out of the whole picture, at its full resolution, while it is decoded."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from kornia_rs.io import decode_image_jpegturbo
from PIL import Image
from torch import Tensor

from contrastive.config import WHITE, DataConfig
from contrastive.data.decode import (
    Encoded,
    Original,
    Unreadable,
    explain_unreadable,
    open_image,
    to_rgb,
    upright_size,
)
from contrastive.data.images import Images
from contrastive.data.wrapped import Wrapped

_JPEG = ("JPEG", "MPO")  # the latter is a JPEG with more pictures behind it
_SPARE = 2  # a JPEG is not scaled below twice the size of a view, for the final filter

Boxes = Callable[[int, int], Tensor]
"""From height and width of an upright image to the boxes of its views: (v, 4) left, top, width, height."""

Draw = Callable[[Tensor, int], Iterable[Boxes]]
"""From rows (b) and epoch to the boxes of each row: a pure function."""


class CroppedImages(Wrapped):
    """The views that training sees of whole images: cut from each, for each epoch, and resized.

    ``read`` returns the pixels of all views (n): each of (s, s, 3), flattened, one after the other.

    Args:
        source: Images that have originals.
        draw: Draws the boxes.
        sides: Side in pixels that each view is cut to.
        epoch: Which epoch's views ``read`` returns.
    """

    def __init__(self, source: Images, draw: Draw, sides: Sequence[int], epoch: int = 0) -> None:
        super().__init__(source)
        self.draw, self.sides, self.epoch = draw, sides, epoch

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``read`` returns."""
        return (sum(3 * side**2 for side in self.sides),)

    def in_epoch(self, epoch: int) -> "CroppedImages":
        """See Images."""
        cropped = copy.copy(self)
        cropped.epoch = epoch
        return cropped

    def read(self, row: int) -> UInt8[Tensor, " n"]:
        """See Images."""
        pixels = torch.empty(1, *self.shape, dtype=torch.uint8)
        for reason in self.read_into(pixels, [row]).values():
            raise Unreadable(reason)
        return pixels[0]

    def read_into(self, pixels: UInt8[Tensor, "b n"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; decodes each image once for all its views."""
        bad = {}
        drawn = self.draw(torch.as_tensor(rows, dtype=torch.int64), self.epoch)
        opened = self.source.open_many(rows)
        for views, row, original, boxes in zip(pixels, rows, opened, drawn, strict=True):
            try:
                if isinstance(original, Unreadable):
                    raise original
                cut_into(views, original, boxes, self.sides, self.source.white)
            except Unreadable as error:
                bad[row] = str(error)
        return bad


def cut_into(
    views: UInt8[Tensor, " n"], original: Original, boxes: Boxes, sides: Sequence[int], white: int = WHITE
) -> None:
    """Decode an image, cut its boxes out of it, and resize each to a square: bilinear, antialiased.

    Equals torchvision's ``resized_crop(..., antialias=True)`` of the whole image, up to rounding. Where every
    box of a JPEG is several times as large as its view, the file is decoded at 1/2, 1/4 or 1/8 of its size.

    Args:
        views: Where the pixels are written: of each view (s, s, 3), flattened, one after the other.
        original: The image; a file is closed.
        boxes: Gives the boxes, within the image.
        sides: Side of each view in pixels.
        white: See ``decode_file``.

    Raises:
        Unreadable: see ``decode_file``.
    """
    with explain_unreadable():
        if isinstance(original, Image.Image):
            _cut(views, original, boxes, sides, white)
        else:
            with original, open_image(original) as (image, turn):
                _cut(views, image, boxes, sides, white, turn, original)


def _cut(
    views: Tensor,
    image: Image.Image,
    boxes: Boxes,
    sides: Sequence[int],
    white: int,
    turn: Image.Transpose | None = None,
    file: Encoded | None = None,
) -> None:
    width, height = upright_size(image, turn)
    drawn = boxes(height, width).tolist()
    shrinkage = min(min(box[2:]) / side for box, side in zip(drawn, sides, strict=True))
    factor = 1
    pixels = _decode_plain(image, file) if turn is None and shrinkage < 2 * _SPARE else None
    if pixels is None:
        before = image.width
        if file is not None:  # an image in memory is not ours to change
            image.draft(None, _at_least(image, shrinkage))
        factor = round(before / image.width)
        image = to_rgb(image, white)
        image = image if turn is None else image.transpose(turn)
        pixels = torch.from_numpy(np.array(image))
    parts = views.split_with_sizes([3 * side**2 for side in sides])
    for view, box, side in zip(parts, drawn, sides, strict=True):
        # Boxes of a scaled image are fractions of its pixels, which interpolate cannot cut.
        cut = _resized(pixels, box, side) if factor == 1 else _resized_scaled(image, factor, box, side)
        view.view(side, side, 3).copy_(cut)


def _decode_plain(image: Image.Image, file: Encoded | None) -> UInt8[Tensor, "h w 3"] | None:
    """Decode a colour JPEG to the pixels that PIL gives, in two thirds of its time; None for other files."""
    if file is None or image.format not in _JPEG or image.mode != "RGB":
        return None
    file.seek(0)
    try:
        return torch.from_numpy(decode_image_jpegturbo(file.read(), "rgb"))
    except Exception:  # it raises no other type; PIL decides whether the file is readable, and says why not
        return None


def _at_least(image: Image.Image, shrinkage: float) -> tuple[int, int]:
    """Return the size below which no view has ``_SPARE`` times the pixels of its side to be resized from."""
    return math.ceil(image.width * _SPARE / shrinkage), math.ceil(image.height * _SPARE / shrinkage)


def _resized(pixels: UInt8[Tensor, "h w 3"], box: Sequence[float], side: int) -> UInt8[Tensor, "s s 3"]:
    left, top, width, height = map(int, box)
    part = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    # Colours side by side take two thirds of the time.
    part = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _resized_scaled(
    image: Image.Image, factor: int, box: Sequence[float], side: int
) -> UInt8[Tensor, "s s 3"]:
    left, top, width, height = (value / factor for value in box)
    part = (left, top, left + width, top + height)
    return torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BILINEAR, box=part)))


def draw_crops(images: Images, data: DataConfig, draw: Draw, sides: Sequence[int]) -> Images:
    """Return what training reads of a data set: crops of whole images, or the images as they are."""
    return CroppedImages(images, draw, sides) if data.crop == "original" else images

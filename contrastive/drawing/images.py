"""Draw training images as thumbnails: scaled, or a query beside its negatives."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from contrastive.drawing.canvas import rgb

_FRAME, _GAP = 3, 2


def film_strip(clip: UInt8[Tensor, "t 3 s s"]) -> UInt8[Tensor, "3 s w"]:
    """Draw the frames of a clip side by side."""
    return torch.cat(clip.unbind(), dim=2)


def still(image: UInt8[Tensor, "*f 3 s s"]) -> UInt8[Tensor, "3 p p"]:
    """Return an image as it is, and of a clip a square of four frames, spread over it, line by line."""
    if image.ndim == 3:
        return image
    some = image[torch.linspace(0, len(image) - 1, 4).long()]
    return torch.cat([film_strip(line) for line in (some[:2], some[2:])], dim=1)


def strip(
    images: Sequence[UInt8[Tensor, "3 s s"]], same: Sequence[bool], side: int = 96
) -> UInt8[Tensor, "3 h w"]:
    """Draw a query and its negatives side by side, ``side`` px each; those marked ``same`` framed in red."""
    tile = side + 2 * (_FRAME + _GAP)
    paper, frame = (torch.tensor(rgb(name), dtype=torch.uint8)[:, None, None] for name in ("card", "same"))
    drawn = paper.repeat(1, tile, tile * len(images))
    for index, (image, framed) in enumerate(zip(images, same, strict=True)):
        left = index * tile + _GAP
        if framed:
            drawn[:, _GAP : tile - _GAP, left : left + side + 2 * _FRAME] = frame
        inner = slice(_GAP + _FRAME, _GAP + _FRAME + side)
        drawn[:, inner, left + _FRAME : left + _FRAME + side] = scaled(image, side)
    return drawn


def scaled(image: UInt8[Tensor, "3 s s"], side: int) -> UInt8[Tensor, "3 t t"]:
    """Enlarge an image by nearest neighbour, or shrink it with antialiasing."""
    if image.shape[-1] <= side:
        return F.interpolate(image[None], size=(side, side), mode="nearest")[0]
    small = F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)

"""Additive Gaussian noise, random erasing, and occlusion by other things."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from contrastive.augment.base import Intensity, Params
from contrastive.augment.noise import MANTISSA, normals

_ERASE_RATIO = (0.3, 3.3)  # torchvision's RandomErasing


class GaussianNoise(Intensity):
    """Additive Gaussian noise, independent for every value.

    The result is not clamped: on a dark background that would make images brighter. A pixel's noise depends
    only on the image's parameters, see contrastive/augment/noise.py.

    Args:
        std: Its standard deviation, in [0, 1] pixel units.
        p: Probability that an image is changed.
    """

    num_uniforms: ClassVar[int] = 3

    def __init__(self, std: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.std = std

    def strengths(self, uniforms: Float[Tensor, "b 2"]) -> Params:
        """Compute ``stream``, two seeds for each image."""
        return {"stream": (uniforms * MANTISSA).to(torch.int64)}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Add noise drawn with the seeds ``stream``."""
        noise = normals(strengths["stream"], math.prod(images.shape[1:]))
        return noise.mul_(self.std).view_as(images).add_(images)


class Erase(Intensity):
    """Random erasing: fill a rectangle with one colour.

    Args:
        scale: Its area as a share of the image, uniform in ``(low, high)``.
        fill: The colour, one value per channel.
        p: Probability that an image is changed.
    """

    num_uniforms: ClassVar[int] = 5

    def __init__(self, scale: tuple[float, float], fill: tuple[float, float, float], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.scale, self.fill = scale, fill

    def strengths(self, uniforms: Float[Tensor, "b 4"]) -> Params:
        """Compute ``rectangle`` for each image: left, top, width, height as shares of the sides.

        Sides longer than the image are cut, where torchvision draws again; for areas up to 0.3 of the image
        neither happens.
        """
        return {"rectangle": _rectangle(uniforms, self.scale)}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Fill the ``rectangle`` of each image."""
        fill = torch.stack([images.new_full((1, 1), value) for value in self.fill])
        return cover(images, strengths["rectangle"], fill)


class Occlude(Intensity):
    """Occlusion: cover a rectangle with one colour, or with the same place of another image.

    Args:
        scale: Its area as a share of the image, uniform in ``(low, high)``.
        pastes: Whether parts of other images are pasted; otherwise each rectangle has a colour of its own.
        p: Probability that an image is changed.
    """

    num_uniforms: ClassVar[int] = 8

    def __init__(self, scale: tuple[float, float], *, pastes: bool = False, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.scale, self.pastes = scale, pastes

    def strengths(self, uniforms: Float[Tensor, "b 7"]) -> Params:
        """Compute for each image ``rectangle``, as Erase does, ``colour``, and ``other`` in [0, 1)."""
        rectangle = _rectangle(uniforms[:, :4], self.scale)
        return {"rectangle": rectangle, "colour": uniforms[:, 4:], "other": uniforms[:, 4]}

    def pasted(self, images: Shaped[Tensor, "b ..."], other: Float[Tensor, " b"]) -> Params:
        """Return ``paint``, what covers each image or clip: any other of the batch, equally likely."""
        count = len(images)
        steps = 1 + (other * (count - 1)).long()
        return {"paint": images[(torch.arange(count, device=images.device) + steps) % count]}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Cover the ``rectangle`` of each image with its ``paint``, or with its ``colour``."""
        paint = strengths["colour"][:, :, None, None]
        if self.pastes:
            paint = strengths.get("paint", self.pasted(images, strengths["other"])["paint"])
        return cover(images, strengths["rectangle"], paint)


def cover(
    images: Float[Tensor, "n 3 h w"], rectangle: Float[Tensor, "n 4"], paint: Float[Tensor, "..."]
) -> Float[Tensor, "n 3 h w"]:
    """Replace the pixels whose centre is in each image's rectangle by those of ``paint``.

    Args:
        images: Any pixel values.
        rectangle: Left, top, width, height as shares of the sides.
        paint: Broadcasts to ``images``.
    """
    start, sides = rectangle.chunk(2, dim=1)
    column = _within(start[:, 0], sides[:, 0], images.shape[-1])
    row = _within(start[:, 1], sides[:, 1], images.shape[-2])
    hidden = (row[:, :, None] & column[:, None, :])[:, None].to(images.dtype)
    return torch.lerp(images, paint, hidden)  # exact at 0 and 1, and far faster than torch.where on a CPU


def _rectangle(uniforms: Float[Tensor, "b 4"], scale: tuple[float, float]) -> Float[Tensor, "b 4"]:
    area = scale[0] + (scale[1] - scale[0]) * uniforms[:, 0]
    low, high = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
    ratio = torch.exp(low + (high - low) * uniforms[:, 1])
    sides = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), dim=1).clamp_max(1)
    return torch.cat((uniforms[:, 2:] * (1 - sides), sides), dim=1)


def _within(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """Return which pixel centres of an axis are inside the interval, (n, pixels)."""
    position = (torch.arange(pixels, device=start.device) + 0.5) / pixels
    return (position >= start[:, None]) & (position < (start + length)[:, None])

"""Additive Gaussian noise and random erasing."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
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
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * uniforms[:, 0]
        low, high = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
        ratio = torch.exp(low + (high - low) * uniforms[:, 1])
        sides = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), dim=1).clamp_max(1)
        return {"rectangle": torch.cat((uniforms[:, 2:] * (1 - sides), sides), dim=1)}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Fill the ``rectangle`` of each image."""
        start, sides = strengths["rectangle"].chunk(2, dim=1)
        column = _within(start[:, 0], sides[:, 0], images.shape[-1])
        row = _within(start[:, 1], sides[:, 1], images.shape[-2])
        hidden = (row[:, :, None] & column[:, None, :])[:, None].to(images.dtype)
        fill = torch.stack([images.new_full((1, 1), value) for value in self.fill])
        return torch.lerp(images, fill, hidden)  # exact at 0 and 1, and far faster than torch.where on a CPU


def _within(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """Return which pixel centres of an axis are inside the interval, (n, pixels)."""
    position = (torch.arange(pixels, device=start.device) + 0.5) / pixels
    return (position >= start[:, None]) & (position < (start + length)[:, None])

"""Colour jitter, grey and solarize, with torchvision's formulas and a separate strength for every image."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.augment.base import Intensity, Params

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale; Kornia's first weight is 0.299


class ColorJitter(Intensity):
    """Brightness, contrast, saturation and hue, always in this order.

    Published recipes draw the order per image, so that every image needs its own sequence of operations; the
    mean and spread of the result differ little. (Kornia draws one order per batch.) Values equal those of
    torchvision's ``adjust_*`` functions in this order, including the clamp to [0, 1] after each.

    Args:
        brightness: The factor is uniform in [max(0, 1 - brightness), 1 + brightness].
        contrast: Range of the factor, see brightness.
        saturation: Range of the factor, see brightness.
        hue: The shift is uniform in [-hue, hue], in turns; at most 0.5.
        p: Probability that an image is changed.
    """

    num_uniforms: ClassVar[int] = 5

    def __init__(
        self, brightness: float, contrast: float, saturation: float, hue: float, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def strengths(self, uniforms: Float[Tensor, "b 4"]) -> Params:
        """Compute factors and shift for each image from uniforms in [0, 1)."""
        return {
            "brightness": _factor(uniforms[:, 0], self.brightness),
            "contrast": _factor(uniforms[:, 1], self.contrast),
            "saturation": _factor(uniforms[:, 2], self.saturation),
            "hue": (2 * uniforms[:, 3] - 1) * self.hue,
        }

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Apply each image's ``brightness``, ``contrast``, ``saturation`` (factors) and ``hue`` (turns)."""
        images = (images * _per_image(strengths["brightness"])).clamp_(0, 1)
        if self.contrast:
            images = _adjust_contrast(images, _per_image(strengths["contrast"]))
        if self.saturation:
            images = _adjust_saturation(images, _per_image(strengths["saturation"]))
        return shift_hue(images, strengths["hue"]) if self.hue else images


class Grayscale(Intensity):
    """Grey images: the luminance on all three channels."""

    num_uniforms: ClassVar[int] = 1

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)

    def strengths(self, uniforms: Float[Tensor, "b 0"]) -> Params:
        """Return nothing: there are no parameters."""
        return {}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Return grey images; the channels do not share memory, as later operations may write to them."""
        return luminance(images).expand_as(images).contiguous()


class Solarize(Intensity):
    """Solarize: invert values of 0.5 and more."""

    num_uniforms: ClassVar[int] = 1

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)

    def strengths(self, uniforms: Float[Tensor, "b 0"]) -> Params:
        """Return nothing: there are no parameters."""
        return {}

    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Return the solarized images."""
        return torch.minimum(images, 1 - images)  # the same within [0, 1], in a tenth of torch.where's time


def luminance(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Compute the weighted sum of the channels, like torchvision's ``rgb_to_grayscale``."""
    red, green, blue = images.chunk(3, dim=1)
    grey: Tensor = red * _LUMA[0]
    return grey.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def shift_hue(images: Float[Tensor, "n 3 h w"], turns: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Shift the hue by ``turns`` at equal value and saturation (HSV), like torchvision's ``adjust_hue``.

    With the hue in sixths of a turn and chroma = max - min, a channel is min + chroma * t(hue), t a
    trapezoid. With each channel scaled to [0, 1] by min and chroma, the distance of the hue from red is
    1 - red + green + blue, and green - blue says on which side. The same function as the six-case tables of
    RGB -> HSV -> RGB, without cases: on a CPU, choosing costs ten times as much as computing.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(low)
    # A grey pixel has chroma 0, so its hue does not matter; a subnormal chroma would make it infinite.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-30)).add_(1).copysign_(green - blue)
    hue.add_(6 * turns[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    shifted = torch.empty_like(images)
    shifted[:, 0].copy_(hue).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    shifted[:, 1].copy_(hue).sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    shifted[:, 2].copy_(hue).sub_(4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    return shifted


def _adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale, in place, the difference to the mean luminance of the image."""
    mean = luminance(images).mean(dim=(1, 2, 3), keepdim=True)
    return images.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale, in place, the difference to the luminance of each pixel."""
    grey = luminance(images).mul_(1 - factor)
    return images.mul_(factor).add_(grey).clamp_(0, 1)


def _factor(uniforms: Tensor, strength: float) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniforms


def _per_image(values: Float[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
    return values[:, None, None, None]

"""Crop, flip, rotate, shift and shear in one antialiased resampling."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive.augment.base import Geometric, Params

_ATTEMPTS = 10  # like torchvision's RandomResizedCrop
_FAR = 1e6  # pixels; outside every filter's support
_SMALL = 64  # pixels up to which, on a CPU, one product per image costs more than it saves


class Crop(Geometric):
    """Random-resized crop, horizontal flip, rotation, shift and shear, resampled once.

    Boxes have the distribution of torchvision's RandomResizedCrop, rounded to whole pixels too. Without
    rotation, shift and shear the resampling is separable, so it is two matrix products with a triangle filter
    as wide as the shrinkage (torchvision's ``antialias=True`` and PIL's bilinear, without their rounding to 8
    bits; Kornia's own does not antialias). With them it is a bilinear look-up; images larger than ``size``
    are first cropped and resized to it. Pixels outside the image are 0, as in torchvision.

    Args:
        size: Side of the output square.
        scale: Area of the box as a share of the image, ``(low, high)``.
        ratio: Its width over height, log-uniform.
        flip: Probability of a flip.
        rotate: Largest angle in degrees, either way.
        translate: Largest shift as a share of ``size``, either way.
        shear: Largest shear along x in degrees, either way.
    """

    num_box: ClassVar[int] = 2 * _ATTEMPTS + 2  # uniforms of the box, the first of all
    num_uniforms: ClassVar[int] = num_box + 5
    _compute_matrix_lazily = True  # Kornia builds the matrix only when something reads it

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        rotate: float = 0.0,
        translate: float = 0.0,
        shear: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.rotate, self.translate, self.shear = rotate, translate, shear
        self.separable = not (rotate or translate or shear)

    def draw(
        self, uniforms: Float[Tensor, "b u"], height: int, width: int, half: Int[Tensor, " b"] | None = None
    ) -> Params:
        """Turn uniforms in [0, 1) into parameters for images of ``height`` x ``width`` pixels.

        Args:
            uniforms: ``num_uniforms`` for each image.
            height: Height of the images.
            width: Width of the images.
            half: Half of the image to draw each box in: 0 left, 1 right, 2 top, 3 bottom; None is the whole.

        Returns:
            ``box`` (left, top, width, height in pixels), ``flip`` (0 or 1), ``angle`` and ``shear`` in
            radians, ``shift`` (x, y as a share of the side).
        """
        boxes, rest = uniforms[:, : self.num_box], uniforms[:, self.num_box :]
        signed = 2 * rest - 1
        return {
            "box": self.boxes(boxes, height, width, half),
            "flip": (rest[:, 0] < self.flip).to(torch.float32),
            "angle": signed[:, 1] * math.radians(self.rotate),
            "shift": signed[:, 2:4] * self.translate,
            "shear": signed[:, 4] * math.radians(self.shear),
        }

    def boxes(
        self, uniforms: Float[Tensor, "b u"], height: int, width: int, half: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b 4"]:
        """Return the ``box`` of ``draw``, from its first ``num_box`` uniforms."""
        if half is None:
            return draw_boxes(uniforms, height, width, self.scale, self.ratio)
        half_width, half_height = max(1, width // 2), max(1, height // 2)
        beside = draw_boxes(uniforms, height, half_width, self.scale, self.ratio)
        above = draw_boxes(uniforms, half_height, width, self.scale, self.ratio)
        box = torch.where((half < 2)[:, None], beside, above)
        box[:, 0] += (half == 1) * (width - half_width)
        box[:, 1] += (half == 3) * (height - half_height)
        return box

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw parameters for Kornia, from torch's global generator."""
        return self.draw(torch.rand(batch_shape[0], self.num_uniforms), batch_shape[-2], batch_shape[-1])

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Compute the views in float32; return them in the dtype of ``input``.

        Without ``box`` in ``params``, the images are crops already.
        """
        flip, angle, shift, shear = (
            params[name].to(input.device) for name in ("flip", "angle", "shift", "shear")
        )
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            images = input.float()
            if "box" in params:
                box = params["box"].to(input.device)
            elif self.separable and images.shape[-1] == self.size:
                return torch.where(flip[:, None, None, None] > 0.5, images.flip(-1), images).to(input.dtype)
            else:
                box = images.new_zeros(len(images), 4)
                box[:, 2:] = images.shape[-1]
            if self.separable:
                return crop_resize(images, box, flip > 0.5, self.size).to(input.dtype)
            if max(images.shape[-2:]) > self.size:
                images = crop_resize(images, box, torch.zeros_like(flip) > 0.5, self.size)
                box = torch.cat((torch.zeros_like(box[:, :2]), torch.full_like(box[:, 2:], self.size)), dim=1)
            motion = _inverse_motion(flip, angle, shift, shear)
            return _look_up(images, _into_box(motion, box, images), self.size).to(input.dtype)

    def compute_transformation(self, input: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """Compute Kornia's (b, 3, 3) matrix from input to output pixel coordinates."""
        box = params["box"].to(input)
        unit = _inverse_motion(*(params[name].to(input) for name in ("flip", "angle", "shift", "shear")))
        inverse = _pixels_from_unit(box) @ _with_last_row(unit) @ _unit_from_pixels(self.size, input)
        matrix: Tensor = torch.linalg.inv(inverse)
        return matrix


def draw_boxes(
    uniforms: Float[Tensor, "b u"],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Tensor, "b 4"]:
    """Draw boxes (left, top, width, height) like torchvision's ``RandomResizedCrop.get_params``.

    Its loop tries areas and ratios until a box fits into the image, at most ten times, then takes the largest
    central one of an allowed ratio. Here all tries are computed at once and the first that fits is taken.

    Args:
        uniforms: Ten for areas, ten for ratios, two for the position.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Area as a share of the image, ``(low, high)``.
        ratio: Width over height, ``(low, high)``.

    Returns:
        Whole numbers in float32.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniforms[:, _ATTEMPTS : 2 * _ATTEMPTS])
    wide, tall = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    fallback = min(max(width / height, ratio[0]), ratio[1])
    box_width = torch.where(
        any_fits, wide.gather(1, first)[:, 0], float(min(width, round(height * fallback)))
    )
    box_height = torch.where(
        any_fits, tall.gather(1, first)[:, 0], float(min(height, round(width / fallback)))
    )
    spare = torch.stack((width - box_width, height - box_height), dim=1)
    corner = torch.where(
        any_fits[:, None],
        (uniforms[:, 2 * _ATTEMPTS :] * (spare + 1)).floor().minimum(spare),
        (spare / 2).floor(),
    )
    return torch.stack((corner[:, 0], corner[:, 1], box_width, box_height), dim=1)


def crop_resize(
    images: Float[Tensor, "b c h w"], box: Float[Tensor, "b 4"], flip: Bool[Tensor, " b"], size: int
) -> Float[Tensor, "b c size size"]:
    """Resize each image's box to a square of ``size`` pixels, antialiased; flip it where ``flip``.

    Equals torchvision's ``resized_crop(..., antialias=True)`` of the same box, up to rounding.
    """
    b, c, height, width = images.shape
    across = _triangle_weights(box[:, 0], box[:, 2], flip, width, size)
    down = _triangle_weights(box[:, 1], box[:, 3], torch.zeros_like(flip), height, size)
    if images.device.type == "cpu" and max(height, width) > _SMALL and not torch.compiler.is_compiling():
        return _resample_boxes(images, box, down, across)
    rows = torch.bmm(images.reshape(b, c * height, width), across.transpose(1, 2))
    return torch.matmul(down[:, None], rows.view(b, c, height, size))


def _resample_boxes(
    images: Float[Tensor, "b c h w"],
    box: Float[Tensor, "b 4"],
    down: Float[Tensor, "b size h"],
    across: Float[Tensor, "b size w"],
) -> Float[Tensor, "b c size size"]:
    """Compute ``down @ image @ across'`` per image, from the pixels of its box: others have weight 0."""
    views = images.new_empty(*images.shape[:2], down.shape[1], across.shape[1])
    corner, end = box[:, :2].floor().long(), (box[:, :2] + box[:, 2:]).ceil().long()
    for number, ((left, top), (right, bottom)) in enumerate(zip(corner.tolist(), end.tolist(), strict=True)):
        x, y = slice(max(0, left), right), slice(max(0, top), bottom)
        torch.matmul(down[number, :, y], images[number, :, y, x] @ across[number, :, x].T, out=views[number])
    return views


def _triangle_weights(
    start: Float[Tensor, " b"], length: Float[Tensor, " b"], flip: Bool[Tensor, " b"], pixels: int, size: int
) -> Float[Tensor, "b size pixels"]:
    """Compute the weight of each input pixel in each output pixel along one axis; rows sum to 1."""
    step = length / size
    reach = step.clamp_min(1.0)[:, None]
    out = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    out = torch.where(flip[:, None], size - out, out)
    centre = (start[:, None] + out * step[:, None]) / reach
    position = torch.arange(pixels, device=start.device, dtype=torch.float32) + 0.5
    inside = (position > start[:, None]) & (position < (start + length)[:, None])
    position = torch.where(inside, position / reach, _FAR)
    weights = (position[:, None, :] - centre[:, :, None]).abs_().neg_().add_(1).relu_()
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _inverse_motion(
    flip: Float[Tensor, " b"],
    angle: Float[Tensor, " b"],
    shift: Float[Tensor, "b 2"],
    shear: Float[Tensor, " b"],
) -> Float[Tensor, "b 2 3"]:
    """Return the map from a point of the view to its point of the crop; both squares are [-1, 1].

    The view is the crop flipped, sheared, rotated and shifted, with torchvision's ``affine`` matrix
    (``_get_inverse_affine_matrix`` at scale 1 and no shear along y, whose determinant is 1).
    """
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    back = torch.stack((cos - sin * tan, cos * tan + sin, -sin, cos), dim=1).view(-1, 2, 2)
    mirror = torch.stack((1 - 2 * flip, torch.ones_like(flip)), dim=1)
    linear = mirror[:, :, None] * back
    return torch.cat((linear, -linear @ (2 * shift)[:, :, None]), dim=2)


def _into_box(
    motion: Float[Tensor, "b 2 3"], box: Float[Tensor, "b 4"], images: Tensor
) -> Float[Tensor, "b 2 3"]:
    """Extend ``motion`` from coordinates of the box to [-1, 1] of the whole image."""
    # One axis at a time with Python numbers: a tensor of the two sides would wait for the device.
    start, length = ((box[:, i] / images.shape[-1], box[:, i + 1] / images.shape[-2]) for i in (0, 2))
    ratio = torch.stack(length, dim=1)
    centre = 2 * torch.stack(start, dim=1) + ratio - 1
    return torch.cat(
        (ratio[:, :, None] * motion[..., :2], (ratio * motion[..., 2] + centre)[..., None]), dim=2
    )


def _look_up(images: Tensor, theta: Float[Tensor, "b 2 3"], size: int) -> Tensor:
    """Sample, bilinearly, the points that ``theta`` gives for each pixel of the view; 0 outside."""
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _pixels_from_unit(box: Float[Tensor, "b 4"]) -> Float[Tensor, "b 3 3"]:
    """Return the matrix from [-1, 1] of a box to pixel coordinates (integers are pixel centres)."""
    half, start = box[:, 2:] / 2, box[:, :2]
    matrix = torch.diag_embed(torch.cat((half, torch.ones_like(half[:, :1])), dim=1))
    matrix[:, :2, 2] = start + half - 0.5
    return matrix


def _unit_from_pixels(size: int, like: Tensor) -> Float[Tensor, "3 3"]:
    """Return the matrix from pixel coordinates of a square to [-1, 1]."""
    offset = (1 - size) / size
    return torch.tensor(
        [[2 / size, 0, offset], [0, 2 / size, offset], [0, 0, 1]], dtype=like.dtype, device=like.device
    )


def _with_last_row(motion: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 3 3"]:
    row = torch.zeros_like(motion[:, :1])
    row[..., 2] = 1
    return torch.cat((motion, row), dim=1)

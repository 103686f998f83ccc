"""Read masks of images, and measure how much of a map lies on the masked thing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, UserError
from contrastive.data.decode import to_square, to_tensor


def mask_file(folder: Path, key: str) -> Path:
    """Return the file of an image's mask: the image's relative name below ``folder``, as ``.png``."""
    return (folder / key).with_suffix(".png")


def read_mask(
    file: Path, data: DataConfig, dimensions: tuple[int, int] | None = None
) -> Float[Tensor, "s s"]:
    """Read which share of each pixel of the centre view shows the thing, in [0, 1].

    The mask is resized and cropped as its image is, so it must have the image's proportions.

    Args:
        file: An image whose pixels are 0 where the thing is not; of colours, each is 0.
        data: How images are cut.
        dimensions: Width and height of the image; None if not known, the proportions are then not checked.

    Raises:
        UserError: the file cannot be read, or has other proportions than the image.
    """
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the mask cannot be read ({error}); write it again, or remove it") from error
    height, width = pixels.shape[:2]
    if dimensions is not None and not _same_proportions((width, height), dimensions):
        raise UserError(
            f"{file}: the mask is {width} x {height} px, its image {dimensions[0]} x {dimensions[1]} px, so "
            "they would be cut differently; give a mask of the whole image, of the same proportions"
        )
    thing = (pixels.reshape(*pixels.shape[:2], -1) != 0).any(2)
    square = to_square(Image.fromarray((255 * thing).astype(np.uint8)).convert("RGB"), data.stored_size)
    plain = replace(data, mean=[0.0] * 3, std=[1.0] * 3)
    return center_view(to_tensor(square)[None], plain)[0, 0]


def _same_proportions(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two pairs of width and height have one ratio, up to one side's rounding to a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def over_area(weights: Float[Tensor, "r c"], mask: Float[Tensor, "s s"]) -> float:
    """Return the share of a map's weight on the thing, over the thing's share of the area.

    With w the map (negative values count as 0), m the mask averaged over each position, and n positions:
    (sum w m / sum w) / (sum m / n). It is 1 for an even map, and n / sum m at most; NaN without a thing.
    """
    rows, columns = weights.shape
    share = F.adaptive_avg_pool2d(mask[None], (rows, columns))[0]
    positive = weights.clamp_min(0)
    return float((positive * share).sum() / positive.sum() / share.mean())

"""``convnext_tiny``: timm's ConvNeXt with a stem that suits the image size."""

from typing import Any

from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.timm_model import TimmEncoder
from memory_bank.config import check_range

LEAST_SIZE = 64
"""Side in pixels from which the published stem is used; below, its last feature map would be 1 x 1."""


def build(name: str, image_size: int, /, *, patch_size: int | None = None, **args: Any) -> TimmEncoder:
    """Build a ConvNeXt with random weights: Liu et al. 2022 (arXiv:2201.03545).

    Args:
        name: timm's name of the network.
        image_size: Side in pixels.
        patch_size: Stride of the stem in pixels; None takes the published 4 from ``LEAST_SIZE`` px, below it
            1, which leaves an eighth of the side, as the small stem of a residual network does.
        args: Further arguments of timm's ``ConvNeXt``, e.g. ``drop_path_rate``.

    Raises:
        ValueError: a patch that does not fit into the image.
        UserError: arguments that timm's network does not have or accept.
    """
    check_range("encoder.args.patch_size", patch_size, 1, image_size)
    stem = {"patch_size": patch_size or (4 if image_size >= LEAST_SIZE else 1)}
    encoder = TimmEncoder(name, image_size, stem | args)
    encoder.arch = ArchSpec(name, stem | args)
    return encoder

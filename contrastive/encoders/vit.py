"""``vit_tiny``, ``vit_small``, ``vit_base``: timm's vision transformers, with patches by image size."""

from typing import Any

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import nn

from contrastive.encoders.library import explain_refusal
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.timm_model import TimmEncoder
from memory_bank.config import check_choice, check_range

PATCHES = (2, 4, 8, 16)
"""Sides of a patch in pixels to choose from."""

MOST_PATCHES = 14
"""Patches along a side above which a larger patch is chosen: 14 x 14 of 16 px make the usual 224 px."""


def build(
    name: str, image_size: int, /, *, patch_size: int | None = None, positions: str = "learned", **args: Any
) -> TimmEncoder:
    """Build a vision transformer with random weights: Dosovitskiy et al. 2021 (arXiv:2010.11929).

    Images of other sizes are accepted too, as local views are: learned positions are interpolated.

    Args:
        name: ``vit_tiny`` (192 channels, 3 heads), ``vit_small`` (384, 6) or ``vit_base`` (768, 12), each of
            12 blocks.
        image_size: Side in pixels, a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels; None takes the smallest of ``PATCHES`` that makes at most
            14 x 14 patches, else 16: 2 up to 28 px, 4 up to 56 px, 8 up to 112 px.
        positions: ``learned``, or ``sincos``: fixed sines and cosines of row and column, see
            ``fix_positions``. Weights from a file replace either.
        args: Further arguments of timm's ``VisionTransformer``, e.g. ``depth`` or ``drop_path_rate``.

    Raises:
        ValueError: patches that do not tile the image, or unknown positions.
        UserError: arguments that timm's network does not have or accept.
    """
    check_choice("encoder.args.positions", positions, ("learned", "sincos"))
    check_range("encoder.args.patch_size", patch_size, 1, image_size)
    patch = patch_size or next((side for side in PATCHES if image_size <= MOST_PATCHES * side), PATCHES[-1])
    if rest := image_size % patch:
        fitting = [size for size in (image_size - rest, image_size - rest + patch) if size]
        raise ValueError(
            f"data.image_size={image_size} is no multiple of the patch's {patch} px; choose "
            f"data.image_size={' or '.join(map(str, fitting))}, or set encoder.args.patch_size"
        )
    model = f"{name}_patch16_224"  # the name of timm's network; its patch and size are replaced
    given = {"patch_size": patch, "dynamic_img_size": True, **args}
    encoder = TimmEncoder(model, image_size, given)
    if positions == "sincos":
        with explain_refusal(name, {"positions": positions, **args}, image_size):
            fix_positions(encoder.network)
    encoder.arch = ArchSpec(name, {"patch_size": patch, "positions": positions, **args})
    return encoder


@torch.no_grad()
def fix_positions(network: Any) -> None:
    """Replace the learned positions of a transformer by fixed ones: MoCo v3, section 5 (arXiv:2104.02057).

    A patch in row r has ``sin(r / 10000 ** (4 i / d))`` and the cosine for i = 0 to d / 4 - 1, and the same
    of its column; a class token has zeros. Differs: another order of the channels.

    Args:
        network: timm's ``VisionTransformer``; changed in place. Its positions get no gradient any more.
    """
    positions: nn.Parameter = network.pos_embed
    table = build_sincos2d_pos_embed(list(network.patch_embed.grid_size), positions.shape[-1])
    positions.zero_()
    positions[:, -len(table) :] = table
    positions.requires_grad_(False)

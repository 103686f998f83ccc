"""Compute the attention maps of images under frozen networks, and draw them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, UserError
from contrastive.drawing.attention import Panels, Scale, component_colours, sheet
from contrastive.drawing.canvas import Drawing
from contrastive.encoders.attention import SIMILARITY, Maps, attention_maps, encode_with_attention
from contrastive.encoders.encoder import Encoder

_MOST = 4  # end of the scale of attention, which begins at its inverse


@torch.no_grad()
def compute_maps(encoder: Encoder, pixels: UInt8[Tensor, "b 3 S S"], data: DataConfig) -> Maps:
    """Compute the maps of images' centre views, on the CPU.

    Args:
        encoder: In evaluation mode.
        pixels: Stored images; the attention weights of each take up to 22 MB in a ViT-B/16 at 224 px.
        data: How views are cut and normalised.

    Raises:
        UserError: the network has no map, see ``attention_maps``, or features are not finite.
    """
    device = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
    encoded = encode_with_attention(encoder, center_view(pixels.to(device), data))
    finite = encoded.tokens.isfinite().all(2).all(1)
    if not finite.all():
        raise UserError(
            f"{encoder.spec.name}: features of {int((~finite).sum())} of {len(finite)} images are NaN or "
            "infinite, no map means anything; take an earlier checkpoint (runs/NAME/checkpoints/step-N)"
        )
    found = attention_maps(encoded, encoder.spec.name)
    maps = {name: values.float().cpu() for name, values in found.maps.items()}
    heads = None if found.heads is None else found.heads.float().cpu()
    return Maps(maps, heads, found.tokens.float().cpu())


def draw(found: Mapping[str, Maps], pixels: UInt8[Tensor, "b 3 S S"], data: DataConfig) -> list[Drawing]:
    """Draw a sheet for each image: the image, and in a row for each network its maps.

    Args:
        found: Maps of these images by network; the networks are of one shape.
        pixels: Stored images.
        data: How views are cut and normalised.
    """
    panels = {name.replace("_", " "): _panels(maps) for name, maps in found.items()}
    scale = _scale([*found.values()])
    return [
        sheet(image, {name: each[index] for name, each in panels.items()}, scale)
        for index, image in enumerate(seen_pixels(pixels, data))
    ]


def seen_pixels(pixels: UInt8[Tensor, "b *t 3 S S"], data: DataConfig) -> UInt8[Tensor, "b *t 3 s s"]:
    """Return the pixels of images or frames that networks see, without normalisation."""
    plain = replace(data, mean=[0.0] * 3, std=[1.0] * 3)
    return (255 * center_view(pixels, plain)).round().clamp(0, 255).to(torch.uint8)


def _panels(found: Maps) -> list[Panels]:
    """Return the panels of each image."""
    colours = component_colours(found.tokens)
    return [
        Panels(
            {title: values[index] for title, values in found.maps.items()},
            [] if found.heads is None else [*found.heads[index]],
            colours[index],
        )
        for index in range(len(colours))
    ]


def _scale(found: Sequence[Maps]) -> Scale:
    """Return one scale for all networks and images: fixed for attention, the range of a similarity."""
    values = [maps.maps[SIMILARITY].flatten() for maps in found if SIMILARITY in maps.maps]
    if not values:
        return Scale(1 / _MOST, _MOST, "times an even spread", logarithmic=True)
    seen = torch.cat(values)
    return Scale(float(seen.min()), float(seen.max()), "cosine with the mean")

"""Draw what networks attend to in an image: maps over it, heads beside them, token components as colours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from contrastive.drawing.canvas import Drawing, Label, Number, Picture, Shape
from contrastive.drawing.images import scaled
from contrastive.drawing.projection import principal_components

_SIDE, _GAP = 128, 8  # of a tile, in units
_PIXELS = 2 * _SIDE  # of a tile: PNG files have 2 px a unit
_LEFT, _TOP, _LEGEND = 20, 20, 84  # names of the networks, headings, what the colours mean
_GREY = 0.4  # share of the picture under a map
_TAILS = 0.02  # of a component's values, which are drawn in full colour
_HEAT = ((16, 48, 140), (96, 146, 214), (216, 216, 216), (240, 130, 60), (170, 8, 24))
"""Colours of a map from its lowest value to its highest, in equal steps; those of the middle are grey."""


@dataclass(frozen=True)
class Scale:
    """The values that the ends of the colours stand for; values beyond take the colour of the end.

    Attributes:
        low: Value drawn blue.
        high: Value drawn red.
        unit: Text below the scale.
        logarithmic: Whether equal steps of the colours are equal factors; both ends are then above 0.
    """

    low: Number
    high: Number
    unit: str
    logarithmic: bool = False

    @property
    def middle(self) -> float:
        """Return the value drawn grey."""
        return math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2

    def place(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the places of values between the ends, in [0, 1]."""
        ends = torch.tensor([self.low, self.high], dtype=values.dtype)
        if self.logarithmic:
            values, ends = values.clamp_min(self.low).log(), ends.log()
        return ((values - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-12)).clamp(0, 1)


@dataclass(frozen=True)
class Panels:
    """Hold the maps of one network that are drawn beside an image.

    Attributes:
        maps: Maps by title.
        heads: Maps of the heads of one layer; may be empty.
        components: Colour of each position, see ``component_colours``.
    """

    maps: Mapping[str, Float[Tensor, "r c"]]
    heads: Sequence[Float[Tensor, "r c"]]
    components: UInt8[Tensor, "3 r c"]


def sheet(image: UInt8[Tensor, "3 s s"], networks: Mapping[str, Panels], scale: Scale) -> Drawing:
    """Draw an image and, in a row for each network, its maps over the image, its heads and its components.

    What the colours mean stands below the image, beside the second row.

    Args:
        image: What the networks see.
        networks: Panels by the name of the network, with the same titles and number of heads.
        scale: Colours of maps and heads.
    """
    first = next(iter(networks.values()))
    heads_per_line = math.ceil(len(first.heads) / 2)
    heads_width = heads_per_line * (_SIDE + _GAP) // 2
    step = _SIDE + _GAP
    heads_left = _LEFT + (1 + len(first.maps)) * step
    components_left = heads_left + (heads_width + _GAP // 2 if first.heads else 0)
    titles = [(_LEFT + place * step, title) for place, title in enumerate(("image", *first.maps))]
    titles += [(heads_left, f"its {len(first.heads)} heads")] if first.heads else []
    titles += [(components_left, "components")]
    shapes: list[Shape] = [Label(left, _TOP - 7, title, "start", "ink") for left, title in titles]
    shapes.append(Picture(_LEFT, _TOP, _SIDE, _SIDE, scaled(image, _PIXELS), "image"))
    for row, (name, panels) in enumerate(networks.items()):
        top = _TOP + row * step
        shapes.append(Label(_LEFT - 7, top + _SIDE / 2, name, "middle", "muted", upright=True))
        for place, (title, values) in enumerate(panels.maps.items(), start=1):
            drawn = overlay(image, scale.place(values), _PIXELS)
            shapes.append(Picture(_LEFT + place * step, top, _SIDE, _SIDE, drawn, f"{name}: {title}"))
        for index, values in enumerate(panels.heads):
            line, column = divmod(index, heads_per_line)
            left, small = heads_left + column * step / 2, _SIDE / 2 - _GAP / 4
            drawn = overlay(image, scale.place(values), _PIXELS // 2)
            shapes.append(
                Picture(left, top + line * (small + _GAP / 2), small, small, drawn, f"head {index}")
            )
        colours = Picture(components_left, top, _SIDE, _SIDE, panels.components, f"{name}: components")
        shapes.append(colours)
    shapes += _legend(_LEFT, _TOP + step + 4, scale)  # below the image, where the other rows have none
    bottom = _TOP + max(len(networks) * step, step + _LEGEND)
    return Drawing(components_left + _SIDE + 2, bottom, "attention", shapes)


def _legend(left: Number, top: Number, scale: Scale) -> list[Shape]:
    return [
        Picture(left, top, _SIDE, 9, heat(torch.linspace(0, 1, 64)[None])),
        Label(left, top + 21, f"{scale.low:.2g}", "start"),
        Label(left + _SIDE / 2, top + 21, f"{scale.middle:.2g}", "middle"),
        Label(left + _SIDE, top + 21, f"{scale.high:.2g}", "end"),
        Label(left, top + 35, scale.unit, "start"),
        Label(left, top + 59, "components: 1st red,", "start"),
        Label(left, top + 73, "2nd green, 3rd blue", "start"),
    ]


def overlay(image: UInt8[Tensor, "3 s s"], values: Float[Tensor, "r c"], side: int) -> UInt8[Tensor, "3 t t"]:
    """Draw a map, in [0, 1], over the image in grey; each position is a rectangle, without smoothing."""
    grey = scaled(image, side).float().mean(0)
    colours = F.interpolate(heat(values)[None].float(), size=(side, side), mode="nearest")[0]
    return (_GREY * grey + (1 - _GREY) * colours).round().to(torch.uint8)


def heat(values: Float[Tensor, "r c"]) -> UInt8[Tensor, "3 r c"]:
    """Return the colours of values in [0, 1], from blue over grey to red."""
    anchors = torch.tensor(_HEAT, dtype=torch.float32)
    place = values.float() * (len(anchors) - 1)
    below = place.long().clamp(max=len(anchors) - 2)
    mixed = torch.lerp(anchors[below], anchors[below + 1], (place - below)[..., None])
    return mixed.round().to(torch.uint8).permute(2, 0, 1)


def component_colours(tokens: Float[Tensor, "b r c d"]) -> UInt8[Tensor, "b 3 r c"]:
    """Return the first three principal components of all tokens as red, green and blue.

    Components are those of all images together, so equal colours are similar tokens in any of them. The 2%
    smallest values of a component are drawn as 0, the 2% largest as 255.
    """
    found = principal_components(tokens.flatten(0, 2), 3)
    low, high = found.quantile(torch.tensor([_TAILS, 1 - _TAILS], dtype=found.dtype), dim=0)
    colours = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    drawn: Tensor = (255 * colours).round().to(torch.uint8).reshape(*tokens.shape[:3], 3)
    return drawn.permute(0, 3, 1, 2)

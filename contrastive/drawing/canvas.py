"""A drawing of a few kinds of shapes, rendered as SVG for a page or as pixels for a PNG file and W&B."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

Number = int | float  # to beartype, an int is no float
Points = Sequence[tuple[Number, Number]]

LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#1d2127",
    "muted": "#646c78",
    "line": "#e2e4e6",
    "card": "#ffffff",
    "same": "#c7362f",
    "on": "#ffffff",
    "s0": "#2563b8",
    "s1": "#d0641c",
    "s2": "#2b8a57",
    "s3": "#8a4fbf",
    "s4": "#a37b0b",
    "s5": "#0d8494",
    "s6": "#c0417b",
    "s7": "#5f6873",
}
"""Named colours: CSS variables on a page, these values in a PNG. ``same`` marks what is wrong."""
DARK = {
    "paper": "#14171b",
    "ink": "#e6e8ea",
    "muted": "#98a1ad",
    "line": "#2c3138",
    "card": "#1a1e23",
    "same": "#f0716a",
    "on": "#14171b",
    "s0": "#71a7f0",
    "s1": "#f0995a",
    "s2": "#6cc997",
    "s3": "#c39bf0",
    "s4": "#dcb84e",
    "s5": "#58c3d2",
    "s6": "#f085b6",
    "s7": "#a5adb8",
}
"""The same names where the reader's system prefers a dark page."""
SERIES = 8
"""Colours that curves and bars may have: ``s0`` to ``s7``."""

_FONT_PX = 11
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # Pillow's names; all on the baseline


class Shape(ABC):
    """A part of a drawing; y counts downwards, a colour is a name of ``LIGHT`` or ``#rrggbb``."""

    @abstractmethod
    def svg(self) -> str:
        """Return one SVG element."""

    @abstractmethod
    def paint(self, image: Image.Image, scale: int) -> None:
        """Draw on ``image``, ``scale`` px a unit."""


@dataclass(frozen=True)
class Dot(Shape):
    """A filled circle; ``title`` is shown while the mouse is over it."""

    x: Number
    y: Number
    radius: Number
    colour: str
    title: str = ""

    def svg(self) -> str:
        """Return a ``circle``."""
        place = f'cx="{self.x:.1f}" cy="{self.y:.1f}" r="{self.radius}"'
        return f'<circle {place} fill="{css(self.colour)}">{_tooltip(self.title)}</circle>'

    def paint(self, image: Image.Image, scale: int) -> None:
        """Draw an ellipse."""
        ends = (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)
        ImageDraw.Draw(image).ellipse([scale * end for end in ends], fill=_rgb(self.colour))


@dataclass(frozen=True)
class Box(Shape):
    """A filled rectangle; ``opacity`` 0 is the paper's colour."""

    x: Number
    y: Number
    width: Number
    height: Number
    colour: str
    opacity: Number = 1.0
    title: str = ""

    def svg(self) -> str:
        """Return a ``rect``."""
        place = f'x="{self.x:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" height="{self.height:.1f}"'
        look = f'fill="{css(self.colour)}" fill-opacity="{self.opacity:.2f}"'
        return f"<rect {place} {look}>{_tooltip(self.title)}</rect>"

    def paint(self, image: Image.Image, scale: int) -> None:
        """Draw a rectangle, its colour mixed with white."""
        mixed = tuple(round(255 - self.opacity * (255 - part)) for part in _rgb(self.colour))
        right, bottom = scale * (self.x + self.width) - 1, scale * (self.y + self.height) - 1
        left, top = scale * self.x, scale * self.y
        ImageDraw.Draw(image).rectangle((left, top, max(left, right), max(top, bottom)), fill=mixed)


@dataclass(frozen=True)
class Line(Shape):
    """Straight segments through ``points``."""

    points: Points
    colour: str
    width: Number = 1.0
    title: str = ""

    def svg(self) -> str:
        """Return a ``path``."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in self.points)
        look = f'fill="none" stroke="{css(self.colour)}" stroke-width="{self.width}"'
        return f'<path d="M{path}" {look} stroke-linejoin="round">{_tooltip(self.title)}</path>'

    def paint(self, image: Image.Image, scale: int) -> None:
        """Draw segments."""
        places = [(scale * x, scale * y) for x, y in self.points]
        width = max(1, round(scale * self.width))
        ImageDraw.Draw(image).line(places, fill=_rgb(self.colour), width=width, joint="curve")


@dataclass(frozen=True)
class Label(Shape):
    """Text whose baseline is at ``y``, or at ``x`` where it is ``upright`` (read from bottom to top)."""

    x: Number
    y: Number
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"
    colour: str = "muted"
    upright: bool = False

    def svg(self) -> str:
        """Return a ``text``."""
        turned = f' transform="rotate(-90 {self.x:.1f} {self.y:.1f})"' if self.upright else ""
        place = f'x="{self.x:.1f}" y="{self.y:.1f}" text-anchor="{self.anchor}"{turned}'
        return f'<text {place} fill="{css(self.colour)}">{escape(self.text)}</text>'

    def paint(self, image: Image.Image, scale: int) -> None:
        """Draw the text; upright text is drawn on the image turned by a quarter."""
        font = ImageFont.load_default(_FONT_PX * scale)
        x, y = scale * self.x, scale * self.y
        drawn = image.transpose(Image.Transpose.ROTATE_270) if self.upright else image
        place = (image.height - 1 - y, x) if self.upright else (x, y)
        ImageDraw.Draw(drawn).text(
            place, self.text, fill=_rgb(self.colour), font=font, anchor=_ANCHORS[self.anchor]
        )
        if self.upright:
            image.paste(drawn.transpose(Image.Transpose.ROTATE_90))


@dataclass(frozen=True)
class Drawing:
    """Shapes on paper.

    Attributes:
        width: In units; text is 11 units high.
        height: In units.
        title: What a screen reader says.
        shapes: Later ones cover earlier ones.
    """

    width: Number
    height: Number
    title: str
    shapes: Sequence[Shape]

    def svg(self) -> str:
        """Render as inline SVG, which fills the width that a page gives it and follows the page's theme."""
        inner = "".join(shape.svg() for shape in self.shapes)
        label = escape(self.title, quote=True)
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{label}">{inner}</svg>'
        )

    def pixels(self, scale: int = 2) -> UInt8[Tensor, "3 h w"]:
        """Render on white, ``scale`` px a unit."""
        canvas = Image.new("RGB", (round(scale * self.width), round(scale * self.height)), LIGHT["card"])
        for shape in self.shapes:
            shape.paint(canvas, scale)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def css(colour: str) -> str:
    """Return a colour as a style sheet names it."""
    return colour if colour.startswith("#") else f"var(--{colour})"


def _rgb(colour: str) -> tuple[int, ...]:
    return ImageColor.getrgb(LIGHT.get(colour, colour))


def _tooltip(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""

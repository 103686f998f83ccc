"""Render a drawing of simple shapes as SVG for a page, or as pixels for a PNG file and W&B."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

Number = int | float  # beartype does not accept an int as a float
Points = Sequence[tuple[Number, Number]]

COLOURS = {
    "paper": ("#fdfdfb", "#14171b"),
    "ink": ("#1d2127", "#e6e8ea"),
    "muted": ("#646c78", "#98a1ad"),
    "line": ("#e2e4e6", "#2c3138"),
    "card": ("#ffffff", "#1a1e23"),
    "same": ("#c7362f", "#f0716a"),
    "on": ("#ffffff", "#14171b"),
    "s0": ("#2563b8", "#71a7f0"),
    "s1": ("#d0641c", "#f0995a"),
    "s2": ("#2b8a57", "#6cc997"),
    "s3": ("#8a4fbf", "#c39bf0"),
    "s4": ("#a37b0b", "#dcb84e"),
    "s5": ("#0d8494", "#58c3d2"),
    "s6": ("#c0417b", "#f085b6"),
    "s7": ("#5f6873", "#a5adb8"),
}
"""Named colours, (light theme, dark theme): CSS variables on a page, the first of them in a PNG."""
SERIES = 8
"""Number of colours for curves and bars: ``s0`` to ``s7``."""

_FONT_PX = 11
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # Pillow's names; all on the baseline


class Dot(NamedTuple):
    """A filled circle; ``title`` is shown while the mouse is over it."""

    x: Number
    y: Number
    radius: Number
    colour: str
    title: str = ""


class Box(NamedTuple):
    """A filled rectangle; invisible with ``opacity`` 0."""

    x: Number
    y: Number
    width: Number
    height: Number
    colour: str
    opacity: Number = 1.0
    title: str = ""


class Line(NamedTuple):
    """Straight segments through ``points``."""

    points: Points
    colour: str
    width: Number = 1.0
    title: str = ""


class Label(NamedTuple):
    """Text with its baseline at ``y``; if ``upright`` (read from bottom to top), at ``x``."""

    x: Number
    y: Number
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"
    colour: str = "muted"
    upright: bool = False


class Picture(NamedTuple):
    """An image, enlarged without smoothing to ``width`` and ``height``."""

    x: Number
    y: Number
    width: Number
    height: Number
    pixels: UInt8[Tensor, "3 h w"]
    title: str = ""


Shape = Dot | Box | Line | Label | Picture
"""y counts downwards; a colour is a name of ``COLOURS`` or ``#rrggbb``."""


@dataclass(frozen=True)
class Drawing:
    """A drawing of shapes.

    Attributes:
        width: Width in units; text is 11 units high.
        height: Height in units.
        title: Text for screen readers.
        shapes: Shapes; later ones cover earlier ones.
    """

    width: Number
    height: Number
    title: str
    shapes: Sequence[Shape]

    def svg(self) -> str:
        """Render as inline SVG, which fills the available width and follows the page's theme."""
        inner = "".join(_svg(shape) for shape in self.shapes)
        label = escape(self.title, quote=True)
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{label}">{inner}</svg>'
        )

    def pixels(self, scale: int = 2) -> UInt8[Tensor, "3 h w"]:
        """Render on white, with ``scale`` px per unit."""
        canvas = Image.new("RGB", (round(scale * self.width), round(scale * self.height)), rgb("card"))
        for shape in self.shapes:
            _paint(shape, canvas, scale)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _svg(shape: Shape) -> str:
    match shape:
        case Dot(x, y, radius, colour, title):
            inner = f'circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{css(colour)}"'
        case Box(x, y, width, height, colour, opacity, title):
            inner = f'rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            inner += f'fill="{css(colour)}" fill-opacity="{opacity:.2f}"'
        case Line(points, colour, width, title):
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            inner = f'path d="M{path}" fill="none" stroke="{css(colour)}" stroke-width="{width}"'
        case Picture(x, y, width, height, pixels, title):
            inner = f'image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            inner += f'href="{data_uri(png(pixels))}" preserveAspectRatio="none" image-rendering="pixelated"'
        case Label(x, y, text, anchor, colour, upright):
            turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
            position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}'
            return f'<text {position} fill="{css(colour)}">{escape(text)}</text>'
    tooltip = f"<title>{escape(title)}</title>" if title else ""
    return f"<{inner}>{tooltip}</{inner.split()[0]}>"


def _paint(shape: Shape, image: Image.Image, scale: int) -> None:
    pen = ImageDraw.Draw(image)
    match shape:
        case Dot(x, y, radius, colour):
            ends = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse([scale * end for end in ends], fill=rgb(colour))
        case Box(x, y, width, height, colour, opacity):
            mixed = tuple(round(255 - opacity * (255 - part)) for part in rgb(colour))
            left, top = scale * x, scale * y
            ends = (left, top, max(left, left + scale * width - 1), max(top, top + scale * height - 1))
            pen.rectangle(ends, fill=mixed)
        case Line(points, colour, width):
            corners = [(scale * x, scale * y) for x, y in points]
            pen.line(corners, fill=rgb(colour), width=max(1, round(scale * width)), joint="curve")
        case Picture(x, y, width, height, pixels):
            size = (round(scale * width), round(scale * height))
            pasted = _to_pil(pixels).resize(size, Image.Resampling.NEAREST)
            image.paste(pasted, (round(scale * x), round(scale * y)))
        case Label(x, y, upright=True):  # draw it horizontally on the image rotated by 90 degrees
            turned = image.transpose(Image.Transpose.ROTATE_270)
            across, down = (image.height - 1) / scale - y, x
            _paint(shape._replace(x=across, y=down, upright=False), turned, scale)
            image.paste(turned.transpose(Image.Transpose.ROTATE_90))
        case Label(x, y, text, anchor, colour):
            font, start = ImageFont.load_default(_FONT_PX * scale), (scale * x, scale * y)
            pen.text(start, text, fill=rgb(colour), font=font, anchor=_ANCHORS[anchor])


def png(image: UInt8[Tensor, "3 h w"]) -> bytes:
    """Return the content of a PNG file of an image."""
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """Return the bytes of a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def css(colour: str) -> str:
    """Return a colour as a CSS value."""
    return colour if colour.startswith("#") else f"var(--{colour})"


def rgb(colour: str) -> tuple[int, ...]:
    """Return a colour of the light theme as RGB numbers."""
    return ImageColor.getrgb(COLOURS[colour][0] if colour in COLOURS else colour)

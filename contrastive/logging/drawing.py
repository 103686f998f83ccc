"""Pictures as tensors: a query with its negatives, a map, a confusion matrix; drawn by Pillow alone."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

_SAME = (214, 39, 40)  # the frame of a negative with its query's label
_RIGHT = (31, 119, 180)
_PAPER = (255, 255, 255)
_FRAME, _GAP = 3, 2
_MAP, _MARGIN = 512, 12
_MOST_NAMES = 24  # of classes, in a legend _NAMES px wide
_NAMES = 150


def strip(
    images: Sequence[UInt8[Tensor, "3 s s"]], same: Sequence[bool], side: int = 96
) -> UInt8[Tensor, "3 h w"]:
    """A query and its negatives side by side, scaled to ``side`` px; those marked ``same`` in a red frame."""
    tile = side + 2 * (_FRAME + _GAP)
    paper = torch.tensor(_PAPER, dtype=torch.uint8)[:, None, None]
    drawn = paper.repeat(1, tile, tile * len(images))
    for place, (image, framed) in enumerate(zip(images, same, strict=True)):
        left = place * tile + _GAP
        if framed:
            frame = torch.tensor(_SAME, dtype=torch.uint8)[:, None, None]
            drawn[:, _GAP : tile - _GAP, left : left + side + 2 * _FRAME] = frame
        inner = slice(_GAP + _FRAME, _GAP + _FRAME + side)
        drawn[:, inner, left + _FRAME : left + _FRAME + side] = scaled(image, side)
    return drawn


def scaled(image: UInt8[Tensor, "3 s s"], side: int) -> UInt8[Tensor, "3 t t"]:
    """Enlarged pixel by pixel, or made smaller without aliasing."""
    if image.shape[-1] <= side:
        return F.interpolate(image[None], size=(side, side), mode="nearest")[0]
    small = F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def principal_plane(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
    """Coordinates along the first two principal components; their signs are fixed, so that maps compare."""
    centred = rows.double() - rows.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :2]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    plane = centred @ (axes * largest.sign())
    return F.pad(plane, (0, 2 - plane.shape[1])).float()


def draw_map(
    points: Float[Tensor, "n 2"], labels: Int[Tensor, " n"] | None, classes: Sequence[str]
) -> UInt8[Tensor, "3 h w"]:
    """Points as dots; with labels each class in a colour of its own (unknown: grey), named if few."""
    named = classes if labels is not None and len(classes) <= _MOST_NAMES else ()
    canvas = Image.new("RGB", (_MAP + (_NAMES if named else 0), _MAP), _PAPER)
    pen = ImageDraw.Draw(canvas)
    low, span = points.amin(0), (points.amax(0) - points.amin(0)).clamp_min(1e-12)
    placed = _MARGIN + (_MAP - 2 * _MARGIN) * (points - low) / span
    given = labels.tolist() if labels is not None else [-1] * len(points)
    for (x, y), label in zip(placed.tolist(), given, strict=True):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour(label, len(classes)))
    for row, name in enumerate(named):
        top = _MARGIN + 20 * row
        pen.rectangle((_MAP + 6, top, _MAP + 16, top + 10), fill=colour(row, len(classes)))
        pen.text((_MAP + 24, top - 1), name[:20], fill=(40, 40, 40))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def draw_confusion(counts: Int[Tensor, "c c"], classes: Sequence[str]) -> UInt8[Tensor, "3 h w"]:
    """Rows are true classes, columns what was said; blue on the diagonal, red where it is wrong.

    Depth of colour is the share of the row, its square root for the mistakes, which are rare.
    """
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    right = torch.eye(len(counts), dtype=torch.bool)
    depth = torch.where(right, share, share.sqrt())[None]
    full = torch.where(right, torch.tensor(_RIGHT)[:, None, None], torch.tensor(_SAME)[:, None, None])
    cells = (255 - depth * (255 - full)).round().to(torch.uint8)
    side = max(1, _MAP // len(counts))
    cells = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)
    if len(classes) > _MOST_NAMES:
        return cells
    canvas = Image.new("RGB", (_NAMES + cells.shape[2], cells.shape[1]), _PAPER)
    canvas.paste(Image.fromarray(cells.permute(1, 2, 0).numpy()), (_NAMES, 0))
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate(classes):
        pen.text((4, row * side + side // 2 - 6), name[:20], fill=(40, 40, 40))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def colour(label: int, classes: int) -> tuple[int, int, int]:
    """Hues evenly apart, neighbours also in lightness; grey for no label."""
    if label < 0:
        return (120, 120, 120)
    red, green, blue = colorsys.hls_to_rgb(label / max(classes, 1), 0.42 + 0.14 * (label % 2), 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)

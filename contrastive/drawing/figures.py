"""Draw figures: line chart, accuracy with its interval, scatter plot, confusion matrix."""

import colorsys
import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from contrastive.drawing.canvas import Box, Dot, Drawing, Label, Line, Points, Shape

_WIDTH, _HEIGHT = 330, 190  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 34
_SIDE = 420  # of a map and of a confusion matrix
_MARGIN = 10
_MOST_NAMES = 24  # of classes beside a map, _NAMES units wide
_NAMES = 150
_MOST_CLASSES = 40  # of a confusion matrix with names
_CELL = 12  # the least height of a row with a name
_UNKNOWN = "#787878"


def line_chart(series: Sequence[tuple[str, Points]], x_label: str = "epoch") -> Drawing:
    """Draw curves over a shared x axis in the colours ``s0``, ``s1``, ...; an empty one takes one too."""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(ys), max(ys), 4)
    x_low, x_high = x_ticks[0], max(max(xs), x_ticks[1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    shapes: list[Shape] = [Label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, x_label)]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        shapes.append(Line([(_LEFT, y), (_WIDTH - _RIGHT, y)], "line"))
        shapes.append(Label(_LEFT - 6, y + 4, number(tick), "end"))
    for tick in x_ticks:
        if tick <= x_high:
            shapes.append(Label(place(tick, y_low)[0], _HEIGHT - _BOTTOM + 15, number(tick)))
    for index, (_, points) in enumerate(series):
        placed = [place(*point) for point in points]
        if len(placed) == 1:
            shapes.append(Dot(*placed[0], 3, f"s{index}"))
        elif placed:
            shapes.append(Line(placed, f"s{index}", 1.8))
    names = ", ".join(name for name, _ in series)
    return Drawing(_WIDTH, _HEIGHT, f"{names} over {x_label}", shapes)


def interval_bar(
    value: float,
    low: float,
    high: float,
    marks: Sequence[tuple[str, float, str]],
    colour: str = "s0",
) -> Drawing:
    """Draw a value in [0, 1] as a bar with its interval, and others as marks (name, value, colour)."""
    width, height = 260, 22

    def place(share: float) -> float:
        return 4 + (width - 8) * min(max(share, 0.0), 1.0)

    shapes: list[Shape] = [
        Line([(4, 11), (width - 4, 11)], "line"),
        Line([(4, 11), (place(value), 11)], colour, 8),
        Line([(place(low), 11), (place(high), 11)], "ink", 1.4),
        *(Line([(place(end), 6), (place(end), 16)], "ink", 1.4) for end in (low, high)),
        *(Line([(place(share), 2), (place(share), 20)], own, 3, name) for name, share, own in marks),
    ]
    return Drawing(width, height, f"{100 * value:.1f}%", shapes)


def scatter(
    points: Float[Tensor, "n 2"],
    labels: Int[Tensor, " n"] | None,
    classes: Sequence[str],
    title: str,
    *,
    legend: bool = False,
) -> Drawing:
    """Draw rows as dots coloured by class (grey: unknown); ``legend`` names the classes if they are few."""
    low, span = points.amin(0), (points.amax(0) - points.amin(0)).clamp_min(1e-12)
    placed = _MARGIN + (_SIDE - 2 * _MARGIN) * (points - low) / span
    row_labels = labels.tolist() if labels is not None else [-1] * len(points)
    shapes: list[Shape] = [
        Dot(x, y, 2.6, class_colour(label, len(classes)), classes[label] if label >= 0 else "")
        for (x, y), label in zip(placed.tolist(), row_labels, strict=True)
    ]
    named = classes if legend and labels is not None and len(classes) <= _MOST_NAMES else ()
    for row, name in enumerate(named):
        top = _MARGIN + 16 * row
        shapes.append(Box(_SIDE + 6, top, 10, 10, class_colour(row, len(classes))))
        shapes.append(Label(_SIDE + 22, top + 9, name[:20], "start", "ink"))
    return Drawing(_SIDE + (_NAMES if named else 0), _SIDE, title, shapes)


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Drawing:
    """Draw a confusion matrix: rows are true classes; blue on the diagonal, red where it is wrong.

    Opacity is the share of the row, for the (rare) mistakes its square root. Up to 40 classes are named.
    """
    named = len(classes) <= _MOST_CLASSES
    margin = 14 + 6 * min(11, max(map(len, classes))) if named else 0
    cell = max(_CELL if named else 1, (_SIDE - margin) / len(classes))
    shapes: list[Shape] = []
    for row, (name, line) in enumerate(zip(classes, counts, strict=True)):
        middle, total = margin + cell * (row + 0.5) + 4, max(1, sum(line))
        if named:
            short = name if len(name) <= 11 else f"{name[:10]}…"
            shapes.append(Label(margin - 6, middle, short, "end"))
            shapes.append(Label(middle, margin - 6, short, "start", upright=True))
        for column, count in enumerate(line):
            if count:
                share = count / total
                depth = max(0.12, share if row == column else share**0.5)
                colour = "s0" if row == column else "same"
                x, y = margin + cell * column, margin + cell * row
                tooltip = f"{name} taken for {classes[column]}: {count} of {total}"
                shapes.append(Box(x, y, 0.96 * cell, 0.96 * cell, colour, depth, tooltip))
                if cell > 22:
                    ink = "on" if depth > 0.6 else "ink"
                    shapes.append(Label(x + cell / 2, y + cell / 2 + 4, f"{count}", colour=ink))
    side = margin + cell * len(classes)
    return Drawing(side, side, "confusion matrix", shapes)


def class_colour(label: int, total: int) -> str:
    """Return one of ``total`` hues, legible on white and on black; grey for -1, an unknown label."""
    if label < 0:
        return _UNKNOWN
    lightness = 0.46 if label % 2 else 0.58
    parts = colorsys.hls_to_rgb(label / max(1, total), lightness, 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that enclose [low, high]; at least two."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Format a number compactly, without rounding noise."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")

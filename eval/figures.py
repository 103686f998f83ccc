"""Small drawings as inline SVG; colours come from the page's style sheet, so they follow light and dark."""

import math
from collections.abc import Sequence
from html import escape

from jaxtyping import Float, Int
from torch import Tensor

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 22


def line_chart(series: Sequence[tuple[str, Points]], x_label: str = "epoch") -> str:
    """Curves over a shared x axis; each is drawn in the page's colour ``s0``, ``s1``, ..."""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(ys), max(ys), 4)
    x_low, x_high = x_ticks[0], max(max(xs), x_ticks[1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * inner_width, 1), round(_HEIGHT - _BOTTOM - up * inner_height, 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        if tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text x="{x}" y="{_HEIGHT - 4}" text-anchor="middle">{number(tick)}</text>')
    for index, (_, points) in enumerate(series):
        if not points:  # its colour stays its own
            continue
        path = "L".join(f"{x} {y}" for x, y in (place(*point) for point in points))
        parts.append(f'<path class="curve s{index}" d="M{path}"/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle class="dot s{index}" cx="{x}" cy="{y}" r="3"/>')
    names = ", ".join(name for name, _ in series)
    return _svg(_WIDTH, _HEIGHT, f"{names} over {x_label}", parts)


def interval_bar(
    value: float, low: float, high: float, marks: Sequence[tuple[str, float]], floor: float, series: int = 0
) -> str:
    """A value in [floor, 1] as a bar with its interval, and others as marks of class ``m-<name>``.

    The bar has the page's colour number ``series``.
    """
    width, height = 260, 22

    def place(share: float) -> float:
        return round(4 + (width - 8) * (min(max(share, floor), 1.0) - floor) / (1 - floor), 1)

    parts = [
        f'<path class="grid" d="M4 11H{width - 4}"/>',
        f'<path class="bar s{series}" d="M4 11H{place(value)}"/>',
        f'<path class="whisker" d="M{place(low)} 11H{place(high)}M{place(low)} 6V16M{place(high)} 6V16"/>',
    ]
    parts += [
        f'<path class="mark m-{name}" d="M{place(share)} 2V20"><title>{escape(name)}</title></path>'
        for name, share in marks
    ]
    return _svg(width, height, f"{100 * value:.1f}%", parts)


def scatter(points: Float[Tensor, "n 2"], labels: Int[Tensor, " n"], classes: Sequence[str]) -> str:
    """Rows as dots coloured by class."""
    side, low, high = 420, points.amin(0), points.amax(0)
    placed = 10 + (side - 20) * (points - low) / (high - low).clamp_min(1e-12)
    parts = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour(label, len(classes))}">'
        f"<title>{escape(classes[label])}</title></circle>"
        for (x, y), label in zip(placed.tolist(), labels.tolist(), strict=True)
    ]
    return _svg(side, side, "map of the test features", parts)


def heat_map(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Confusion matrix: rows are true classes, shaded by their share, off-diagonal in the warning colour."""
    side, margin = 420, 14 + 6 * min(11, max(map(len, classes)))
    cell = (side - margin) / len(classes)
    inner = cell * 0.96
    parts = []
    for row, (name, line) in enumerate(zip(classes, counts, strict=True)):
        middle, total = margin + cell * (row + 0.5), max(1, sum(line))
        short = escape(name if len(name) <= 11 else f"{name[:10]}…")
        parts.append(f'<text x="{margin - 6}" y="{middle + 4:.1f}" text-anchor="end">{short}</text>')
        parts.append(f'<text transform="translate({middle + 4:.1f} {margin - 6}) rotate(-90)">{short}</text>')
        for column, count in enumerate(line):
            if not count:
                continue
            x, y, share = margin + cell * column, margin + cell * row, count / total
            kind = "right" if row == column else "wrong"
            title = f"{classes[row]} taken for {classes[column]}: {count} of {total}"
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{inner:.1f}" height="{inner:.1f}" '
                f'fill-opacity="{max(0.12, share):.2f}"><title>{escape(title)}</title></rect>'
            )
            if cell > 22:
                strong = " strong" if share > 0.5 else ""
                parts.append(
                    f'<text class="count{strong}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
                    f'text-anchor="middle">{count}</text>'
                )
    return _svg(side, side, "confusion matrix", parts)


def colour(index: int, total: int) -> str:
    """One of ``total`` hues of medium lightness, legible on white and on black."""
    hue = 360 * index / max(1, total)
    return f"hsl({hue:.0f} 62% {46 if index % 2 else 58}%)"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that enclose [low, high]; at least two."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Short, without float noise."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    body = "".join(parts)
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}</svg>'

"""Draw the frames of a clip as a strip, with how much of it each network takes from each frame."""

from collections.abc import Mapping

from jaxtyping import Float, UInt8
from torch import Tensor

from contrastive.drawing.canvas import Box, Drawing, Label, Line, Number, Picture, Shape
from contrastive.drawing.images import scaled

_WIDTH, _MOST_SIDE = 720, 88  # of the strip, and of a frame, in units
_LEFT, _TOP, _GAP, _BARS = 40, 6, 8, 54


def time_sheet(
    frames: UInt8[Tensor, "t 3 s s"], weights: Mapping[str, Float[Tensor, " t"]], highest: Number
) -> Drawing:
    """Draw the frames side by side and, in a row for each network, a bar below each frame.

    Args:
        frames: What the networks see.
        weights: Weights of the frames by the name of the network; each sum to 1.
        highest: Weight of a bar of full height, as a multiple of an even spread: more than 1.
    """
    step = min(_MOST_SIDE, _WIDTH / len(frames))
    right = _LEFT + step * len(frames)
    shapes: list[Shape] = [
        Picture(_LEFT + step * j, _TOP, step - 2, step - 2, scaled(frame, 2 * _MOST_SIDE), f"frame {j}")
        for j, frame in enumerate(frames)
    ]
    bottom = _TOP + step
    for name, own in weights.items():
        bottom += _GAP + _BARS
        shapes.append(Label(12, bottom - _BARS / 2, name, "middle", "muted", upright=True))
        for j, share in enumerate((own * len(frames)).tolist()):
            height = _BARS * min(share / highest, 1.0)
            left, title = _LEFT + step * j, f"{name}, frame {j}: {share:.2f} times an even spread"
            shapes.append(Box(left, bottom - height, step - 2, height, "s0", title=title))
        even = bottom - _BARS / highest
        shapes += [Line([(_LEFT, even), (right, even)], "ink"), Label(_LEFT - 4, even + 4, "1", "end")]
    return Drawing(right + 2, bottom + _GAP, "weights of the frames", shapes)

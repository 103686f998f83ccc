"""``data.name=moving_digits``: scikit-learn's digits in eight motions, which need no files."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from contrastive.config import DataConfig, UserError
from contrastive.data.clips import Clips, ClipSpec
from contrastive.data.dataset import Dataset
from contrastive.data.digits import open_digits
from contrastive.data.images import Images

MOTIONS = ("right", "left", "down", "up", "turn", "turn_back", "grow", "shrink")
"""Names of the motions; each odd one is the even one before it, run backwards."""

FRAMES, _FPS = 24, 12.0
_SIDE = 0.6  # of a digit, as a share of the frame
_GROWTH = 2.0  # sizes lie between _SIDE / sqrt(_GROWTH) and _SIDE * sqrt(_GROWTH)
_PERIODS = (12, 20)  # frames in which a motion comes round again


@dataclass(frozen=True)
class _Path:
    """The place, angle and size of a digit in the first frame, and how fast one of them changes.

    All are in turns: each comes round again after 1, a size by a jump from the largest to the smallest.
    """

    start: Float64[np.ndarray, " 4"]
    axis: int
    speed: float

    @classmethod
    def of(cls, key: str, axis: int) -> "_Path":
        words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:20], dtype="<u4") / 2**32
        period = _PERIODS[0] + (_PERIODS[1] - _PERIODS[0]) * words[4]
        return cls(words[:4], axis, 1 / period)

    def at(self, frames: Int64[np.ndarray, " f"]) -> Float64[np.ndarray, "f 4"]:
        """Return x, y, angle and size of each frame, in turns, in [0, 1)."""
        turns = np.repeat(self.start[None], len(frames), axis=0)
        turns[:, self.axis] += self.speed * frames
        around: Float64[np.ndarray, "f 4"] = turns % 1
        return around


class MovingDigits(Clips):
    """Videos of 24 frames: a digit moves over a frame whose opposite borders are joined, or turns, or grows.

    Every digit is in two videos, rows 2i and 2i + 1: one of the four even ``MOTIONS``, and the same frames
    backwards. Place, angle and size of the first frame are drawn for each digit, and what changes comes round
    again. So one frame says nothing about the motion, and the set of all frames only what it has in common
    with its reverse: without the order of the frames at most half of the labels can be told.

    Args:
        digits: The digits.
        spec: Frames of a clip.
    """

    def __init__(self, digits: Images, spec: ClipSpec) -> None:
        super().__init__(spec, digits.size)
        self.digits, self.classes = digits, list(MOTIONS)
        # By the number of the digit in the whole set, so that each motion is equally often in both parts.
        self._paths = [_Path.of(f"moving/{digits.key(row)}", row % 4) for row in range(len(digits))]
        self.labels = torch.tensor([2 * path.axis + back for path in self._paths for back in range(2)])

    def __len__(self) -> int:
        return 2 * len(self.digits)

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """See Clips; 12 frames a second."""
        return np.arange(FRAMES) / _FPS

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """See Clips; draws the frames."""
        digit, back = divmod(row, 2)
        frames = FRAMES - 1 - indices if back else indices
        grey = _draw(self.digits.read(digit)[0].numpy(), self._paths[digit].at(frames), self.size)
        return torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)

    def key(self, row: int) -> str:
        """Return e.g. ``digits/17/left``."""
        assert self.labels is not None
        return f"{self.digits.key(row // 2)}/{MOTIONS[int(self.labels[row])]}"

    def stamp(self, row: int) -> str:
        """Return the stamp of the digit: the rest follows from the key."""
        return self.digits.stamp(row // 2)


def _draw(
    digit: UInt8[np.ndarray, "d d"], turns: Float64[np.ndarray, "f 4"], size: int
) -> UInt8[np.ndarray, "f s s"]:
    """Draw a digit at each place, angle and size, by bilinear look-up; 0 outside of it."""
    pixel = (np.arange(size) + 0.5) / size
    x, y, angle, growth = (turns[:, place, None, None] for place in range(4))
    # Distance from the digit's middle across the nearer border, in shares of the frame.
    right, down = (pixel[None, None, :] - x + 0.5) % 1 - 0.5, (pixel[None, :, None] - y + 0.5) % 1 - 0.5
    cos, sin = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
    side = len(digit)
    scale = side / (_SIDE * _GROWTH ** (growth - 0.5))
    column, line = (
        (turned * scale + side / 2 + 0.5)  # in pixels of the digit with a border of one
        for turned in (cos * right + sin * down, cos * down - sin * right)
    )
    grey: UInt8[np.ndarray, "f s s"] = np.rint(_look_up(np.pad(digit, 1), line, column)).astype(np.uint8)
    return grey


def _look_up(
    pixels: UInt8[np.ndarray, "h w"], line: Float[np.ndarray, "f s s"], column: Float[np.ndarray, "f s s"]
) -> Float[np.ndarray, "f s s"]:
    """Interpolate between the four nearest pixels; beyond the border of ``pixels`` its value is repeated."""
    last = len(pixels) - 1
    line, column = line.clip(0, last), column.clip(0, last)
    top, left = (np.minimum(part.astype(np.int64), last - 1) for part in (line, column))
    down, right = line - top, column - left
    upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
    lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
    mixed: Float[np.ndarray, "f s s"] = upper * (1 - down) + lower * down
    return mixed


def open_moving_digits(data: DataConfig) -> Dataset:
    """Open 2,670 training and 924 test videos of the digits in the parts of ``data.name=digits``.

    Raises:
        UserError: see ``open_digits``.
    """
    if data.root:
        raise UserError(
            f"data.root={data.root}: data.name=moving_digits reads no folder; for your own videos add "
            "data.name=clips, for the digits data.root=null"
        )
    digits = open_digits(data)
    train, test = (MovingDigits(part, ClipSpec.of(data)) for part in (digits.train, digits.test) if part)
    return Dataset(train, train, test)

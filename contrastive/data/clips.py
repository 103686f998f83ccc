"""Cut clips from videos: which frames they have, evenly spaced for evaluation or drawn for training."""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt8
from torch import Tensor

from contrastive.config import DataConfig
from contrastive.data.decode import Unreadable
from contrastive.data.images import Images
from contrastive.data.wrapped import Wrapped

_NEAR = 1e-6  # seconds, or frames: times are rational numbers, rounded
_THREADS = 8  # that read the length of videos

Moments = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From rows (b) and epoch to where the clips of a video begin (b, v), in [0, 1), and their speeds (b, v).

A speed is 1 where nothing else was asked for, and below 0 for a clip that runs backwards.
"""


@dataclass(frozen=True)
class ClipSpec:
    """The frames of a clip, and the number of clips that evaluation takes of a video.

    Attributes:
        frames: Frames of a clip, t.
        step: Distance of its frames, in frames of the video.
        fps: Frames a second of a clip, by the video's clock; None takes ``step``.
        clips: Clips of a video.
    """

    frames: int
    step: int = 1
    fps: float | None = None
    clips: int = 1

    @classmethod
    def of(cls, data: DataConfig) -> "ClipSpec":
        """Return the frames that the settings describe."""
        return cls(data.frames, data.frame_step, data.fps, data.clips_per_video)

    def indices(
        self, times: Float64[np.ndarray, " n"], start: float, speed: float = 1.0
    ) -> Int64[np.ndarray, " t"]:
        """Return the frames of a clip: of each moment the frame that a player shows.

        Args:
            times: When each frame of the video is shown, in seconds, ascending.
            start: Where the clip begins, in [0, 1): 0 at the first frame, and almost 1 as late as the video
                leaves room. A clip that is longer than its video stays on the last frame.
            speed: Of playback; below 0 the same clip backwards.
        """
        if self.fps is None:
            axis, unit, length = np.arange(len(times), dtype=np.float64), abs(speed) * self.step, len(times)
        else:
            axis, unit = times - times[0], abs(speed) / self.fps
            length = axis[-1] * len(times) / max(1, len(times) - 1)  # the last frame is shown for a while too
        begin = start * max(0.0, length - unit * (self.frames - 1))
        moments = (begin // 1 if self.fps is None else begin) + unit * np.arange(self.frames)
        found = np.searchsorted(axis, moments + _NEAR, side="right") - 1
        return found[::-1] if speed < 0 else found

    def evenly(self, times: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " f"]:
        """Return the frames of ``clips`` clips, spread evenly over the video, one after the other."""
        starts = (np.arange(self.clips) + 0.5) / self.clips
        return np.concatenate([self.indices(times, start) for start in starts])


class Clips(Images):
    """Data set of videos, of which clips are read; subclass it for videos of your own.

    ``read`` returns ``spec.clips`` clips, spread evenly over the video, one after the other along the first
    axis; if that is one frame, it is an image: the middle one, without the axis. Training reads others, see
    ``DrawnClips``.

    Args:
        spec: Frames of a clip.
        size: Side of the decoded square.
    """

    are_videos = True

    def __init__(self, spec: ClipSpec, size: int) -> None:
        frames = spec.clips * spec.frames
        self.spec, self.size, self.frames = spec, size, frames if frames > 1 else 0

    @abstractmethod
    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return when each frame of a video is shown, in seconds, ascending; two frames or more.

        Raises:
            Unreadable: it cannot be decoded, or does not move.
        """

    @abstractmethod
    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Decode some frames of a video, in any order, which may repeat.

        Raises:
            Unreadable: one of them cannot be decoded.
        """

    def read(self, row: int) -> UInt8[Tensor, "*f 3 s s"]:
        """See Images; the clips of evaluation."""
        frames = self.read_frames(row, self.spec.evenly(self.times(row)))
        return frames if self.frames else frames[0]


def check_moves(num_frames: int) -> None:
    """Raise Unreadable unless there are two frames: a video of one is an image."""
    if num_frames < 2:
        raise Unreadable(f"{num_frames} frame{'s' * (num_frames != 1)}, a video needs 2 or more")


class DrawnClips(Wrapped):
    """The clips that training sees: of each row those of all its views, at moments drawn for each epoch.

    Args:
        source: The videos.
        spec: Frames of a clip.
        moments: Draws where the clips begin, a pure function of row and epoch.
        views: Clips of a row, one after the other along the first axis of what ``read`` returns.
        epoch: Which epoch's clips ``read`` returns.
    """

    def __init__(
        self, source: Images, spec: ClipSpec, moments: Moments, views: int = 2, epoch: int = 0
    ) -> None:
        super().__init__(source)
        self.spec, self.moments, self.epoch, self.frames = spec, moments, epoch, views * spec.frames

    def in_epoch(self, epoch: int) -> "DrawnClips":
        """See Images."""
        drawn = copy.copy(self)
        drawn.epoch = epoch
        return drawn

    def indices(self, rows: Sequence[int]) -> Iterator[Int64[np.ndarray, " f"]]:
        """Yield the frames of each row's clips, by the noise alone: nothing is decoded.

        Raises:
            Unreadable: the length of a video cannot be read.
        """
        return (self._frames(row, clips) for row, clips in self._draw(rows))

    def _draw(self, rows: Sequence[int]) -> Iterator[tuple[int, list[tuple[float, float]]]]:
        """Yield each row with start and speed of its clips."""
        starts, speeds = (drawn.tolist() for drawn in self.moments(torch.as_tensor(rows), self.epoch))
        for row, *both in zip(rows, starts, speeds, strict=True):
            yield row, list(zip(*both, strict=True))

    def _frames(self, row: int, clips: list[tuple[float, float]]) -> Int64[np.ndarray, " f"]:
        times = self.times(row)
        return np.concatenate([self.spec.indices(times, *clip) for clip in clips])

    def read(self, row: int) -> UInt8[Tensor, "f 3 s s"]:
        """See Images."""
        return self.read_frames(row, next(self.indices([row])))

    def read_into(self, pixels: UInt8[Tensor, "b f 3 s s"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; draws the moments of all rows at once."""
        bad = {}
        for place, (row, clips) in enumerate(self._draw(rows)):
            try:
                pixels[place] = self.read_frames(row, self._frames(row, clips))
            except Unreadable as error:
                bad[row] = str(error)
        return bad

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return the source's times."""
        return self.source.times(row)

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Return the source's frames."""
        return self.source.read_frames(row, indices)


def draw_clips(images: Images, data: DataConfig, moments: Moments, views: int = 2) -> Images:
    """Return what training reads of a data set: drawn clips of videos, and images as they are."""
    return DrawnClips(images, ClipSpec.of(data), moments, views) if images.are_videos else images


class AllFrames(Wrapped):
    """All frames of all videos as images, one after the other: what a resident set or a cache keeps.

    Reads the length of every video, in threads.

    Args:
        source: The videos.

    Attributes:
        shown: Of each video when its frames are shown; none if it cannot be read.
        starts: Row here of each video's first frame, and the number of frames at the end.
        bad: Reason for each video that cannot be read.
    """

    def __init__(self, source: Images) -> None:
        super().__init__(source)
        self.labels, self.classes, self.frames, self.are_videos = None, None, 0, False
        self.bad: dict[int, str] = {}
        with ThreadPoolExecutor(_THREADS if source.thread_safe else 1) as pool:
            self.shown = list(pool.map(self._shown, range(len(source))))
        self.starts = np.cumsum([0, *map(len, self.shown)])

    def _shown(self, row: int) -> Float64[np.ndarray, " n"]:
        try:
            return self.source.times(row)
        except Unreadable as error:
            self.bad[row] = str(error)
            return np.zeros(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, row: int) -> int:
        """Return the video of a row."""
        return self.find(row)[0]

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        video, frame = self.find(row)
        return self.source.read_frames(video, np.array([frame]))[0]

    def read_into(self, pixels: UInt8[Tensor, "b 3 s s"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; reads the frames of a video together, since most need those before them."""
        bad: dict[int, str] = {}
        at = 0
        for video, found in groupby(map(self.find, rows), key=lambda place: place[0]):
            frames = np.array([frame for _, frame in found])
            here, at = slice(at, at + len(frames)), at + len(frames)
            try:
                pixels[here] = self.source.read_frames(video, frames)
            except Unreadable as error:
                bad |= dict.fromkeys(rows[here], str(error))
        return bad

    def videos(self, bad: dict[int, str]) -> dict[int, str]:
        """Return the videos that cannot be read, given the frames that cannot, with the reasons."""
        return self.bad | {self.find(row)[0]: reason for row, reason in bad.items()}

    def key(self, row: int) -> str:
        """Return the video's key and the number of the frame."""
        video, frame = self.find(row)
        return f"{self.source.key(video)}#{frame}"

    def revision(self) -> str:
        """Hash the videos' keys and versions and the numbers of their frames, instead of every frame."""
        return self._hash(self.source.revision())

    def fingerprint(self) -> str:
        """Hash the videos' keys and contents and the numbers of their frames, instead of every frame."""
        return self._hash(self.source.fingerprint())

    def _hash(self, videos: str) -> str:
        return hashlib.sha256(f"{videos} {self.starts.tolist()}".encode()).hexdigest()

    def find(self, row: int) -> tuple[int, int]:
        """Return the video of a row, and the frame's number in it."""
        video = int(np.searchsorted(self.starts, row, side="right")) - 1
        return video, row - int(self.starts[video])


class StoredFrames(DrawnClips):
    """Drawn clips whose videos were decoded before: frames are looked up, videos no longer opened.

    Args:
        drawn: The clips.
        index: All frames of their videos.
        decoded: The same frames, decoded.
    """

    def __init__(self, drawn: DrawnClips, index: AllFrames, decoded: Images) -> None:
        super().__init__(drawn.source, drawn.spec, drawn.moments, drawn.frames // drawn.spec.frames)
        self.index, self.decoded = index, decoded

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return the times, as they were when the frames were decoded."""
        if row in self.index.bad:
            raise Unreadable(self.index.bad[row])
        return self.index.shown[row]

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """Look up decoded frames."""
        pixels = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for reason in self.decoded.read_into(pixels, (self.index.starts[row] + indices).tolist()).values():
            raise Unreadable(reason)
        return pixels

    def places(self, rows: Int[Tensor, " b"], epoch: int) -> Int[Tensor, "b f"]:
        """Return the places, among all frames, of the frames of each row's clips."""
        found = [*self.in_epoch(epoch).indices(rows.tolist())]
        starts = torch.from_numpy(self.index.starts)[rows]
        return torch.from_numpy(np.stack(found)) + starts[:, None] if found else rows[:, None]


def fits(images: Images, most: int) -> bool:
    """Return whether all frames of all videos take up to ``most`` bytes; stops counting beyond."""
    left = most // (3 * images.size**2)
    for count in _counts(images):
        left -= count
        if left < 0:
            return False
    return True


def _counts(images: Images) -> Iterator[int]:
    for row in range(len(images)):
        try:
            yield len(images.times(row))
        except Unreadable:
            yield 0

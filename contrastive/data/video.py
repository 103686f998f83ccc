"""``data.name=clips``: video files, read frame by frame with PyAV, or folders of frames."""

import importlib
import os
import re
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt8
from torch import Tensor

from contrastive.config import DataConfig, UserError
from contrastive.data.clips import Clips, ClipSpec, check_moves
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.decode import Unreadable, explain_unreadable, read_dimensions, read_file, why_unreadable
from contrastive.data.encoded import FileImages
from contrastive.data.files import IMAGE, Kind, holds, list_files, log_once, split_class_folders

_ENDINGS = "mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts wmv flv 3gp ogv y4m h264"
VIDEO = Kind(
    "video",
    tuple(f".{ending}" for ending in _ENDINGS.split()),
    "where these are videos, save them as .mp4 or .mkv",
)
FRAMES = Kind("video", IMAGE.endings, IMAGE.remedy)  # files of which a folder is a video

_LISTS = ("concat", "hls", "dash")  # formats that show other files, which may lie anywhere
_DECODED = "by planes of RGB"  # change it when a frame becomes other pixels
_REMEMBERED = 20_000  # videos whose index is kept in memory: a few KiB each


@dataclass(frozen=True)
class FrameIndex:
    """The index of a video file: its frames in the order in which they are shown.

    Attributes:
        stamps: Time stamp of each frame, in the file's unit, ascending; frame numbers if ``numbered``.
        times: The same in seconds from the first frame.
        key_frames: Number of each frame from which decoding can begin.
        numbered: Whether frames have no stamps, so that the file is read from its beginning.
    """

    stamps: Int64[np.ndarray, " n"]
    times: Float64[np.ndarray, " n"]
    key_frames: Int64[np.ndarray, " k"]
    numbered: bool


class VideoClips(Clips, FileImages):
    """Video files below one root; sound is ignored.

    A frame is found by its time stamp, so it is the same however it is reached, at any frame rate, also a
    variable one. The first look at a file lists its packets, without decoding them; to read some frames, the
    decoder begins at the key frame before, and memory holds one decoded frame beside those asked for.

    Frames are turned as the file says, scaled so that the shorter side is ``size`` px, and cut to the centred
    square. Pixels are taken as square.

    Args:
        root: Folder that keys are relative to.
        keys: Relative paths.
        spec: Frames of a clip.
        size: Side of the decoded square.
        labels: Class of each key, or None.
        classes: Names of the classes, or None.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        keys: list[bytes],
        spec: ClipSpec,
        size: int,
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        FileImages.__init__(self, root, keys, size, labels, classes)
        Clips.__init__(self, spec, size)
        self._indices: OrderedDict[int, FrameIndex] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """See Clips."""
        return self._index_of(row).times

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """See Clips."""
        index, wanted = self._index_of(row), np.unique(indices)
        try:
            frames = decode_frames(self.path(row), index, wanted, self.size)
        except Unreadable:
            raise
        except Exception as error:  # PyAV raises a class for each error of FFmpeg, and others
            raise Unreadable(_why(error)) from error
        return torch.from_numpy(frames[np.searchsorted(wanted, indices)])

    def dimensions(self, row: int) -> tuple[int, int]:
        """Return width and height, by the file's header."""
        try:
            with _open(self.path(row)) as container:
                stream = container.streams.video[0]
                return stream.width, stream.height
        except Exception as error:  # as above
            raise Unreadable(_why(error)) from error

    def version(self, row: int) -> str:
        """Return size and time of writing, and how frames are decoded: caches of before have other pixels."""
        return f"{super().version(row)} {_DECODED}"

    def _index_of(self, row: int) -> FrameIndex:
        with self._lock:
            index = self._indices.get(row)
        if index is None:
            index = index_frames(self.path(row))
            with self._lock:
                self._indices[row] = index
                if len(self._indices) > _REMEMBERED:
                    self._indices.popitem(last=False)
        return index


class FrameClips(Clips, FileImages):
    """Folders of frames: each folder that holds images is a video, its files in the order of their numbers.

    Args:
        root: Folder that keys are relative to.
        keys: Relative paths of the folders.
        spec: Frames of a clip.
        size: Side of the decoded square.
        labels: Class of each key, or None.
        classes: Names of the classes, or None.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        keys: list[bytes],
        spec: ClipSpec,
        size: int,
        labels: Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        FileImages.__init__(self, root, keys, size, labels, classes)
        Clips.__init__(self, spec, size)
        self._counts: dict[int, int] = {}

    def files(self, row: int) -> list[bytes]:
        """Return the paths of a video's frames, in order."""
        folder = self.path(row)
        try:
            names = [name for name in os.listdir(folder) if IMAGE.holds(name) and not name.startswith(b".")]
        except OSError as error:
            raise Unreadable(why_unreadable(error)) from error
        return [os.path.join(folder, name) for name in sorted(names, key=_natural)]

    def times(self, row: int) -> Float64[np.ndarray, " n"]:
        """Return the numbers of the frames: files have no clock."""
        count = len(self._same_files(row))
        check_moves(count)
        return np.arange(count, dtype=np.float64)

    def read_frames(self, row: int, indices: Int64[np.ndarray, " f"]) -> UInt8[Tensor, "f 3 s s"]:
        """See Clips."""
        files = self._same_files(row)
        read = {index: read_file(files[index], self.size, self.white) for index in {*indices.tolist()}}
        return torch.stack([read[index] for index in indices.tolist()])

    def _same_files(self, row: int) -> list[bytes]:
        """Return ``files``; Unreadable if they are not as many as when the row was first read."""
        files = self.files(row)
        before = self._counts.setdefault(row, len(files))
        if len(files) != before:  # numbers would mean other frames, or none
            raise Unreadable(f"{len(files)} frames, {before} before: it changes while it is read")
        return files

    def dimensions(self, row: int) -> tuple[int, int]:
        """Return width and height of the first frame."""
        with explain_unreadable(), open(next(iter(self.files(row)), b""), "rb") as file:
            return read_dimensions(file)

    def stamp(self, row: int) -> str:
        """Return the number of frames and their size in bytes, or ``unreadable``."""
        try:
            sizes = [os.stat(file).st_size for file in self.files(row)]
        except (Unreadable, OSError):
            return "unreadable"
        return f"{len(sizes)} {sum(sizes)}"

    def version(self, row: int) -> str:
        """Return the stamp, and when the last frame was written."""
        try:
            return f"{self.stamp(row)} {max(os.stat(file).st_mtime_ns for file in self.files(row))}"
        except (Unreadable, OSError, ValueError):
            return "unreadable"


def _natural(name: bytes) -> list[tuple[int, bytes]]:
    """Return a key that sorts 2.png before 10.png."""
    return [(int(part), b"") if part.isdigit() else (-1, part) for part in re.split(rb"(\d+)", name)]


def open_clips(data: DataConfig) -> Dataset:
    """Open the video files below ``data.root``, or the folders of frames if there is no video file.

    If each lies in a class folder (``root/CLASS/NAME``, or ``root/train/CLASS/NAME`` beside ``test/``), the
    folders are the labels and there is a test part, as for ``imagefolder``; else there are no labels, and all
    are trained on.

    Raises:
        UserError: PyAV is not installed; ``data.fps`` for frames, which have no clock; see also
            ``open_class_folders``.
    """
    root = root_of(data)
    has_videos, has_images = (holds(root, kind) for kind in (VIDEO, IMAGE))
    folders = has_images and not has_videos
    if has_videos and has_images:
        log_once(
            f"data.root={root}: the video files are taken, and images beside them are not; if folders of "
            "frames are videos too, move them elsewhere, and train on one kind at a time"
        )
    if not folders:
        import_av()
    elif data.fps is not None:
        raise UserError(
            f"data.fps={data.fps:g}: data.root={root} holds folders of frames, which have no clock; use "
            "data.frame_step"
        )
    kind, group = (FRAMES, _folders_of) if folders else (VIDEO, list)
    build = partial(
        FrameClips if folders else VideoClips, root, spec=ClipSpec.of(data), size=data.stored_size
    )
    keys = group(list_files(root, kind))
    if not _are_labelled(root, keys):
        return Dataset(build(keys))
    split = split_class_folders(root, kind, group)
    train, test = (
        build(part, labels=split.labels(part), classes=split.classes) for part in (split.train, split.test)
    )
    return Dataset(train, train, test, split.held_out_by_hash)


def _folders_of(keys: list[bytes]) -> list[bytes]:
    return sorted(set(map(os.path.dirname, keys)))


def _are_labelled(root: Path, keys: list[bytes]) -> bool:
    """Return whether every path is CLASS/NAME, or PART/CLASS/NAME where parts are split."""
    depths = {key.count(b"/") for key in keys}
    split = (root / "train").is_dir() and any((root / part).is_dir() for part in ("val", "test"))
    several = len({key.split(b"/")[split] for key in keys if key.count(b"/") > split}) > 1
    return depths == {2 if split else 1} and several


def import_av() -> Any:
    """Return PyAV, which reads video files.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            "video files are read with PyAV, which is not installed: pip install "
            "'contrastive-pretrain[video]'; or give folders of frames"
        ) from error


def _open(path: bytes) -> Any:
    if os.path.exists(path) and not os.path.getsize(path):
        raise Unreadable("empty file")
    container = import_av().open(os.fsdecode(path), metadata_errors="replace")
    is_list = container.format.name in _LISTS
    if is_list or not container.streams.video:
        container.close()
        raise Unreadable("a list of other files" if is_list else "no pictures in it")
    # Workers are the parallelism; a decoder of several threads would also hold frames back.
    container.streams.video[0].codec_context.thread_count = 1
    return container


def _why(error: Exception) -> str:
    if isinstance(error, Unreadable):
        return str(error)
    return why_unreadable(error)


def index_frames(path: bytes) -> FrameIndex:
    """List the frames of a video file by its packets, without decoding them.

    Raises:
        Unreadable: it cannot be opened, is cut off, or has fewer than two frames.
    """
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
            expected, unit, rate = stream.frames, stream.time_base, stream.average_rate
    except Unreadable:
        raise
    except Exception as error:  # PyAV raises a class for each error of FFmpeg, and others
        raise Unreadable(_why(error)) from error
    if len(packets) < expected:
        raise Unreadable(f"cut off: {len(packets)} of {expected} frames")
    check_moves(len(packets))
    if any(stamp is None for stamp, _ in packets):
        numbers = np.arange(len(packets))
        return FrameIndex(numbers, numbers / float(rate or 25), numbers[:1], numbered=True)
    packets.sort(key=lambda packet: packet[0])
    stamps = np.array([stamp for stamp, _ in packets], dtype=np.int64)
    keys = np.array([number for number, (_, is_key) in enumerate(packets) if is_key], dtype=np.int64)
    return FrameIndex(stamps, (stamps - stamps[0]) * float(unit), keys, numbered=False)


def decode_frames(
    path: bytes, index: FrameIndex, wanted: Int64[np.ndarray, " f"], size: int
) -> UInt8[np.ndarray, "f 3 s s"]:
    """Decode some frames of a video file.

    Args:
        path: The file.
        index: Its index.
        wanted: Numbers of the frames, ascending, each once.
        size: Side of the square that they become.

    Raises:
        Unreadable: one of them is damaged or missing.
    """
    pixels = np.empty((len(wanted), 3, size, size), dtype=np.uint8)
    scale = import_av().video.reformatter.VideoReformatter()
    frames = _frames_at(path, index, wanted)
    for place, (number, frame) in enumerate(zip(wanted, frames, strict=True)):
        if frame.is_corrupt:
            raise Unreadable(f"frame {number} is damaged")
        pixels[place] = _to_square(scale, frame, size)
    return pixels


def _frames_at(path: bytes, index: FrameIndex, wanted: Int64[np.ndarray, " f"]) -> Iterator[Any]:
    """Yield the wanted frames; decode from the last key frame before each."""
    begins = np.searchsorted(index.key_frames, wanted, side="right") - 1
    places = zip(begins.tolist(), index.stamps[wanted].tolist(), strict=True)
    with _open(path) as container:
        for key, group in groupby(places, key=lambda place: place[0]):
            stamps = [stamp for _, stamp in group]
            frames = _decode_from(container, index, key)
            if frames is not None:
                yield from _shown(frames, stamps)
                continue
            with _open(path) as again:
                yield from _shown(_stamped(again, index), stamps)


def _decode_from(container: Any, index: FrameIndex, key: int) -> Iterator[tuple[int, Any]] | None:
    """Decode from a key frame on; None if the file's own index leads to a later one.

    The time at which a key frame is shown is sought: by that at which it is decoded, which is earlier where
    frames are shown out of order, FFmpeg begins an mp4 at the key frame before.
    """
    if key <= 0:  # only ever asked for first
        return _stamped(container, index)
    shown = int(index.stamps[index.key_frames[key]])
    container.seek(shown, stream=container.streams.video[0])
    frames = _stamped(container, index)
    first = next(frames, None)
    return None if first is None or first[0] > shown else chain([first], frames)


def _stamped(container: Any, index: FrameIndex) -> Iterator[tuple[int, Any]]:
    """Decode the frames with their stamps; in files without them a frame's number, from the beginning."""
    for number, frame in enumerate(container.decode(video=0)):
        yield (number if index.numbered else frame.pts), frame


def _shown(frames: Iterator[tuple[int, Any]], stamps: list[int]) -> Iterator[Any]:
    """Yield the frame that is shown at each of some ascending moments; decode no further than the last."""
    left, before = deque(stamps), None
    for stamp, frame in frames:
        # A packet without a picture of its own leaves the frame before it on show.
        while left and before is not None and left[0] < stamp:
            left.popleft()
            yield before
        if left and left[0] == stamp:
            left.popleft()
            yield frame
        if not left:
            return
        before = frame
    raise Unreadable(f"cut off: {len(left)} frames are missing")


def _to_square(scale: Any, frame: Any, size: int) -> UInt8[np.ndarray, "3 s s"]:
    """Scale the shorter side to ``size``, in one pass with the conversion to RGB; cut the centre; turn it.

    To planes of red, green and blue: to ``rgb24`` FFmpeg scales colours to half the width first.
    """
    ratio = size / min(frame.width, frame.height)
    width, height = (max(size, round(side * ratio)) for side in (frame.width, frame.height))
    small = scale.reformat(frame, width, height, format="gbrp", interpolation="AREA").to_ndarray()
    left, top = (width - size) // 2, (height - size) // 2
    square = small[top : top + size, left : left + size]
    # The file's angle is against the clock, and so is NumPy's.
    turned: UInt8[np.ndarray, "3 s s"] = np.rot90(square, round(frame.rotation / 90)).transpose(2, 0, 1)
    return turned

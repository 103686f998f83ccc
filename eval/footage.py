"""Read the frames of long recordings one after the other: video files, or folders of frames."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.decode import Unreadable, read_file, to_square, to_tensor, why_unreadable
from contrastive.data.files import list_images, log_once, shorten
from contrastive.data.images import Images, printable

VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
"""Extensions of video files that are read."""


class Footage(Images):
    """All frames of all recordings, one recording after the other; read them in order.

    A video file is decoded forward, and anew from its beginning for an earlier frame. Frames that the file
    announces and that cannot be decoded are unreadable.

    Args:
        root: Folder of the recordings: video files, or folders of images, whose names sort in time.
        size: Side of the decoded square.

    Attributes:
        names: Names of the recordings, without extensions.
        starts: Row of each recording's first frame, and the number of frames at the end.

    Raises:
        UserError: no recording, frames with gaps in their numbers, two of one name, or PyAV is missing.
    """

    thread_safe = False

    def __init__(self, root: Path, size: int) -> None:
        self.size = size
        self._files = _recordings(root)
        self.names = [
            printable(os.fsencode(path.stem if path.is_file() else path.name)) for path in self._files
        ]
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise UserError(f"{root}: several recordings are called {twice[0]}; rename all but one")
        self._frames = [_list_frames(path) for path in self._files]
        counts = [each if isinstance(each, int) else len(each) for each in self._frames]
        empty = {name for name, count in zip(self.names, counts, strict=True) if not count}
        if empty:
            raise UserError(f"{root}: no frame in {shorten(sorted(empty))}; move these away")
        self.starts = np.cumsum([0, *counts])
        self._playing: tuple[int, int, Iterator[Any]] | None = None  # recording, its next frame, the frames

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, row: int) -> tuple[int, int]:
        """Return the recording of a row, and the frame's number in it."""
        recording = int(np.searchsorted(self.starts, row, side="right")) - 1
        return recording, row - int(self.starts[recording])

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        recording, frame = self.find(row)
        files = self._frames[recording]
        if not isinstance(files, int):
            return read_file(files[frame], self.size)
        try:
            return to_tensor(to_square(self._play(recording, frame).to_image(), self.size))
        except StopIteration:
            raise Unreadable("the video ends before") from None
        except Exception as error:  # decoders raise a class for each error of FFmpeg
            self._playing = None
            raise Unreadable(why_unreadable(error)) from error

    def key(self, row: int) -> str:
        """Return e.g. ``kitchen#17``."""
        recording, frame = self.find(row)
        return f"{self.names[recording]}#{frame}"

    def stamp(self, row: int) -> str:
        """Return the size in bytes of the frame's file or of the recording."""
        recording, frame = self.find(row)
        files = self._frames[recording]
        path = self._files[recording] if isinstance(files, int) else files[frame]
        try:
            return str(os.stat(path).st_size)
        except OSError:
            return "unreadable"

    def _play(self, recording: int, frame: int) -> Any:
        """Return a frame of a video file, by decoding up to it."""
        if self._playing is None or self._playing[0] != recording or self._playing[1] > frame:
            self._playing = recording, 0, _decode(self._files[recording])
        _, at, frames = self._playing
        found = next(frames)
        for _ in range(frame - at):
            found = next(frames)
        self._playing = recording, frame + 1, frames
        return found


def _recordings(root: Path) -> list[Path]:
    """List video files, or folders, sorted by name; a folder of frames alone is one recording.

    Raises:
        UserError: there are none.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; give the folder of the recordings")
    seen = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    videos = [path for path in seen if path.suffix.lower() in VIDEOS]
    folders = [path for path in seen if path.is_dir()]
    if videos and folders:
        log_once(f"data.root={root}: {len(folders)} folders beside the video files are left out")
    if not videos and not folders:
        raise UserError(
            f"data.root={root}: no recording; video files ({' '.join(VIDEOS)}) or a folder of frames for "
            "each are needed"
        )
    return videos or folders


def _list_frames(path: Path) -> int | list[bytes]:
    """Return the number of frames of a video file, or the files of a folder of frames.

    Raises:
        UserError: it cannot be opened, or numbers are missing among the frames.
    """
    if path.is_dir():
        names = list_images(path)
        stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
        numbers = sorted(int(stem) for stem in stems if stem.isdigit())
        if len(numbers) == len(names):
            missing = sorted({*range(numbers[0], numbers[-1] + 1)} - {*numbers})
            if missing:
                raise UserError(
                    f"{path}: frames {shorten([str(number) for number in missing])} are missing, so times "
                    "would be wrong; add them, or number the frames anew"
                )
            names = [name for _, name in sorted(zip(map(int, stems), names, strict=True))]
        return [os.path.join(os.fsencode(path), name) for name in names]
    try:
        with _av().open(str(path)) as container:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"{path}: not a video that can be read ({why_unreadable(error)}); move it away"
        ) from error


def _decode(path: Path) -> Iterator[Any]:
    with _av().open(str(path)) as container:
        yield from container.decode(video=0)


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            "video files need PyAV, which is not installed: pip install 'contrastive-pretrain[video]'; or "
            "give folders of frames"
        ) from error

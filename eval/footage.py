"""Read the frames of long recordings: video files, or folders of frames."""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from contrastive.config import WHITE, UserError
from contrastive.data.clips import AllFrames, ClipSpec
from contrastive.data.decode import Unreadable
from contrastive.data.files import log_once, shorten
from contrastive.data.video import VIDEO, FrameClips, VideoClips, import_av


class Footage(AllFrames):
    """All frames of all recordings, one recording after the other.

    Args:
        root: Folder of the recordings: video files, or folders of images, whose names sort in time.
        size: Side of the decoded square.
        white: See ``data.white``.

    Attributes:
        names: Names of the recordings, without extensions.

    Raises:
        UserError: no recording, one that cannot be read, frames with gaps in their numbers, two of one name,
            or PyAV is missing.
    """

    def __init__(self, root: Path, size: int, white: int = WHITE) -> None:
        videos = _open_recordings(root, size)
        videos.white = white
        super().__init__(videos)
        names = map(videos.key, range(len(videos)))
        is_file = isinstance(videos, VideoClips)
        self.names = [os.path.splitext(name)[0] if is_file else name for name in names]
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise UserError(f"{root}: several recordings are called {twice[0]}; rename all but one")
        if self.bad:
            row, reason = min(self.bad.items())
            raise UserError(
                f"{root}: {len(self.bad)} of {len(videos)} recordings cannot be read "
                f"({videos.key(row)}: {reason}); repair them, or move them away"
            )
        if isinstance(videos, FrameClips):
            for row in range(len(videos)):
                _check_numbers(videos.path(row), videos.files(row))

    def read_into(self, pixels: UInt8[Tensor, "b 3 s s"], rows: Sequence[int]) -> dict[int, str]:
        """See Images; frames that were asked for together with a broken one are read again, each alone."""
        bad = super().read_into(pixels, rows)
        for place, row in enumerate(rows):
            if row in bad:
                try:
                    pixels[place] = self.read(row)
                except Unreadable as error:
                    bad[row] = str(error)
                else:
                    del bad[row]
        return bad

    def key(self, row: int) -> str:
        """Return e.g. ``kitchen#17``."""
        recording, frame = self.find(row)
        return f"{self.names[recording]}#{frame}"


def _open_recordings(root: Path, size: int) -> VideoClips | FrameClips:
    """Open the video files in ``root``, or else its folders, sorted by name.

    Raises:
        UserError: there are none.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; give the folder of the recordings")
    seen = sorted(os.fsencode(path.name) for path in root.iterdir() if not path.name.startswith("."))
    videos = [name for name in seen if VIDEO.holds(name)]
    folders = [name for name in seen if (root / os.fsdecode(name)).is_dir()]
    if not videos and not folders:
        raise UserError(
            f"data.root={root}: no recording; video files ({' '.join(VIDEO.endings)}) or a folder of frames "
            "for each are needed"
        )
    if not videos:
        return FrameClips(root, folders, ClipSpec(2), size)
    if folders:
        log_once(f"data.root={root}: folders beside the video files are left out: {len(folders)}")
    import_av()
    return VideoClips(root, videos, ClipSpec(2), size)


def _check_numbers(folder: bytes, files: Sequence[bytes]) -> None:
    """Raise UserError if files are numbered, and numbers are missing between the first and the last."""
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    if not all(map(bytes.isdigit, stems)):
        return
    numbers = sorted(map(int, stems))
    if missing := sorted({*range(numbers[0], numbers[-1] + 1)} - {*numbers}):
        raise UserError(
            f"{os.fsdecode(folder)}: frames {shorten([str(number) for number in missing])} are missing, "
            "so times would be wrong; add them, or number the frames anew"
        )

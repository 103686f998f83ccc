"""Measure frames per second of decoding and the memory of clips of a long video, against PyAV used directly.

All frames of a video of 720p: ours (index by packets, decode, scale to squares of 128 px) against PyAV alone
(decode, convert to RGB at full size). Clips of 8 frames, a second apart, at drawn moments: ours against PyAV
seeking and decoding the same frames. Arms take turns; compare the processor times of one run only. Then the
memory that reading clips adds, for a video of --minutes.

    python benchmarks/bench_video.py [--minutes 10] [--seconds 20] [--repeats 5]
"""

import argparse
import os
import resource
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import RESULTS, context, median, quartiles, take_turns, write

from contrastive.data.clips import ClipSpec
from contrastive.data.video import VideoClips

SIZE, RATE, CLIPS = 128, 25, 8


def film(path: Path, seconds: int) -> None:
    """Write a video of 720p in which something moves, with a key frame every 250 frames at most."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 160 + 64, 3), dtype=np.uint8)
    large = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(seconds * RATE):
            start = number * 4 % 512
            pixels = np.ascontiguousarray(large[:720, start : start + 1280])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def open_film(path: Path) -> VideoClips:
    return VideoClips(path.parent, [path.name.encode()], ClipSpec(CLIPS, fps=1.0), SIZE)


def all_frames(path: Path, seconds: int) -> dict[str, Callable[[], object]]:
    def ours() -> object:
        return open_film(path).read_frames(0, np.arange(seconds * RATE))

    def direct() -> object:
        with av.open(str(path)) as file:
            file.streams.video[0].codec_context.thread_count = 1
            return sum(int(frame.to_ndarray(format="rgb24")[0, 0, 0]) for frame in file.decode(video=0))

    return {"all frames": ours, "all frames, PyAV": direct}


def clips(path: Path) -> dict[str, Callable[[], object]]:
    images = open_film(path)
    times = images.times(0)
    starts = np.random.default_rng(1).random(6)
    wanted = [images.spec.indices(times, start) for start in starts]

    def ours() -> object:
        return [images.read_frames(0, frames) for frames in wanted]

    def direct() -> object:
        return [_sought(path, frames) for frames in wanted]

    return {"clips": ours, "clips, PyAV": direct}


def _sought(path: Path, frames: np.ndarray[Any, np.dtype[np.int64]]) -> list[Any]:
    """Seek the first frame, then decode to the last one, as a program without an index does."""
    left, found = {*frames.tolist()}, []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        file.seek(round(float(frames[0]) / RATE / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            number = round(float(frame.time) * RATE)
            if number in left:
                left.remove(number)
                found.append(frame.to_ndarray(format="rgb24"))
            if not left:
                return found
    return found


def memory(path: Path, repeats: int) -> float:
    """Return the MiB that reading clips at drawn moments adds to the peak of the process."""
    images, before = open_film(path), _peak()
    for start in np.random.default_rng(2).random(repeats):
        images.read_frames(0, images.spec.indices(images.times(0), start))
    return _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        long, short = Path(folder, "long.mp4"), Path(folder, "short.mp4")
        for path, seconds in ((long, 60 * given.minutes), (short, given.seconds)):
            if seconds:  # in a process of its own, whose memory is not counted
                writing = get_context("spawn").Process(target=film, args=(path, seconds))
                writing.start()
                writing.join()
        grown = memory(long if given.minutes else short, 5)
        spent = take_turns(all_frames(short, given.seconds) | clips(short), given.repeats)
        size = os.path.getsize(long if given.minutes else short)
    used = {name: [one.processor for one in each] for name, each in spent.items()}
    shares = {
        name: [theirs / ours for ours, theirs in zip(used[name], used[f"{name}, PyAV"], strict=True)]
        for name in ("all frames", "clips")
    }
    result = {
        "context": context("bench_video", torch.device("cpu"), ["av", "torch"]),
        "frames_per_processor_second": given.seconds * RATE / median(used["all frames"]),
        "speed_over_pyav": {
            name: {"median": median(each), "quartiles": quartiles(each)} for name, each in shares.items()
        },
        "memory": {"minutes": given.minutes, "file_mib": size / 2**20, "added_mib": grown},
        "repeats": given.repeats,
    }
    write(RESULTS / "video.json", result)
    print(result["frames_per_processor_second"], result["speed_over_pyav"], result["memory"])


if __name__ == "__main__":
    main()

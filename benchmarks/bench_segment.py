"""Time the segmentation of cached features: by default of one hour of video at 12 frames a second.

python benchmarks/bench_segment.py [--frames 43200] [--dimensions 512] [--threads N] [--repeats 5]
"""

import argparse
from pathlib import Path

import faiss
import numpy as np
import torch
from common import RESULTS, context, median, once, quartiles, walls, write

from eval.segment import SegmentConfig, find_actions
from eval.segmenting import describe_windows

PACKAGES = ("numpy", "faiss-cpu", "scikit-learn")
ACTIONS, LENGTH, NOISE = 8, 30, 1.0


def routine(frames: int, dimensions: int) -> np.ndarray:
    """Return noisy features of one recording of actions that last some 30 frames."""
    draw = np.random.default_rng(0)
    labels = np.repeat(
        draw.integers(0, ACTIONS, frames // LENGTH * 2), draw.geometric(1 / LENGTH, frames // LENGTH * 2)
    )
    centres = draw.normal(size=(ACTIONS, dimensions))
    rows = centres[labels[:frames]] + NOISE * draw.normal(size=(frames, dimensions))
    return rows.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=43_200)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "segment.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    features, starts = routine(options.frames, options.dimensions), np.array([0, options.frames])
    settings = SegmentConfig(actions=ACTIONS)

    def step() -> None:
        find_actions(describe_windows(features, starts, settings.window), starts, settings)

    spent = [once(step) for _ in range(options.repeats)]
    result = {
        "frames": options.frames,
        "dimensions": options.dimensions,
        "seconds": median(walls(spent)),
        "seconds_quartiles": quartiles(walls(spent)),
        "seconds_least": min(walls(spent)),
        "processor_seconds": median([one.processor for one in spent]),
    }
    seconds = f"{result['seconds']:.1f} s, {result['processor_seconds']:.1f} s of processors"
    print(f"{options.frames} frames in {seconds}")
    write(options.out, context("segment", torch.device("cpu"), PACKAGES) | result)


if __name__ == "__main__":
    main()

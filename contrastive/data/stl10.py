"""``data.name=stl10``: verified and downloaded by torchvision, memory-mapped from its raw files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import DataConfig
from contrastive.data.arrays import ArrayImages
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.torchvision_sets import fetch

_SIDE = 96


def open_stl10(data: DataConfig) -> Dataset:
    """Open STL-10: pretraining sees the 5,000 labelled images, then 100,000 without a label (-1).

    Evaluation fits on the labelled 5,000 and scores on the 8,000 of the test part.

    Raises:
        UserError: they are not in ``data.root``, and ``data.download`` is false or the download failed.
    """
    root = root_of(data)
    known = fetch(
        "STL10", root, data.download, split="train"
    )  # the smallest part; torchvision verifies all of them
    folder, classes = root / known.base_folder, list(known.classes)
    labelled, test = (
        ArrayImages(
            f"stl10/{part}",
            [_pixels(folder / f"{part}_X.bin")],
            data.stored_size,
            labels=_labels(folder / f"{part}_y.bin"),
            classes=classes,
        )
        for part in ("train", "test")
    )
    arrays = [_pixels(folder / f"{part}_X.bin") for part in ("train", "unlabeled")]
    labels = torch.cat([_labels(folder / "train_y.bin"), torch.full((len(arrays[1]),), -1)])
    train = ArrayImages("stl10/train+unlabeled", arrays, data.stored_size, labels=labels, classes=classes)
    return Dataset(train, labelled, test)


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Map (n, 96, 96, 3) without loading it: the unlabelled part has 2.8 GB. The file is column-major."""
    flat: np.ndarray[Any, np.dtype[np.uint8]] = np.memmap(path, dtype=np.uint8, mode="r")
    return flat.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)


def _labels(path: Path) -> Int[Tensor, " n"]:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8).astype(np.int64) - 1)  # stored from 1

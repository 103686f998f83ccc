"""Published sets: scikit-learn's digits; CIFAR, STL-10 and ImageNet as torchvision reads them."""

import hashlib
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.config import UserError
from contrastive.data.files import open_class_folders
from contrastive.data.images import ArrayImages, FileImages

DIGITS_TEST_ROWS = 462  # of 1,797
_STL10_SIDE = 96


def open_digits(size: int) -> tuple[ArrayImages, ArrayImages]:
    """Scikit-learn's handwritten digits (8x8, 16 greys): 1,335 training and 462 test images.

    The test part is fixed: the 462 rows whose key ``digits/ROW`` has the smallest SHA-256. So it is
    random as to writer and class, and owes nothing to any result.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError("data.name=digits needs scikit-learn: pip install scikit-learn") from error
    bunch = datasets.load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    ranked = sorted(range(len(pixels)), key=lambda row: hashlib.sha256(f"digits/{row}".encode()).digest())
    parts = [np.sort(np.array(part)) for part in (ranked[DIGITS_TEST_ROWS:], ranked[:DIGITS_TEST_ROWS])]
    classes = [str(name) for name in bunch.target_names]
    train, test = (
        ArrayImages("digits", [pixels], size, rows=rows, labels=_labels(bunch.target[rows]), classes=classes)
        for rows in parts
    )
    return train, test


def open_cifar(classes: int, root: Path, size: int, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """CIFAR-10 or CIFAR-100: the official 50,000 training and 10,000 test images.

    Raises:
        UserError: not in ``root``, and not to be (or failed to be) downloaded.
    """
    kind = getattr(_torchvision(), f"CIFAR{classes}")
    train = _fetch(lambda fetch: kind(str(root), train=True, download=fetch), root, download)
    test = _fetch(lambda fetch: kind(str(root), train=False, download=fetch), root, download)
    return _cifar(f"cifar{classes}/train", train, size), _cifar(f"cifar{classes}/test", test, size)


def open_stl10(root: Path, size: int, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """STL-10: the labelled 5,000 training and 8,000 test images.

    Raises:
        UserError: as ``open_cifar``.
    """
    folder, classes = _stl10(root, download)
    train, test = (
        ArrayImages(
            f"stl10/{part}",
            [_stl10_pixels(folder / f"{part}_X.bin")],
            size,
            labels=_stl10_labels(folder / f"{part}_y.bin"),
            classes=classes,
        )
        for part in ("train", "test")
    )
    return train, test


def open_stl10_unlabelled(root: Path, size: int, download: bool) -> ArrayImages:
    """STL-10 for pretraining: the labelled 5,000, then the 100,000 whose label is unknown (-1).

    Raises:
        UserError: as ``open_cifar``.
    """
    folder, classes = _stl10(root, download)
    arrays = [_stl10_pixels(folder / f"{part}_X.bin") for part in ("train", "unlabeled")]
    known = _stl10_labels(folder / "train_y.bin")
    labels = torch.cat([known, torch.full((len(arrays[1]),), -1)])
    return ArrayImages("stl10/train+unlabeled", arrays, size, labels=labels, classes=classes)


def open_imagenet(root: Path, size: int) -> tuple[FileImages, FileImages]:
    """ImageNet (ILSVRC 2012): the official 1,281,167 training and 50,000 validation images.

    ``root`` holds ``train/`` and ``val/`` with a folder for each WordNet id; or image-net.org's three
    archives, which are unpacked beside themselves, once (another 150 GB).

    Raises:
        UserError: neither is there, an archive is damaged, or as ``files.open_class_folders``.
    """
    if root.is_dir() and not all((root / part).is_dir() for part in ("train", "val")):
        _unpack_imagenet(root)
    train, test, _ = open_class_folders(root, size)
    return train, test


def _unpack_imagenet(root: Path) -> None:
    """By one process of this machine; a part appears under its name when it is complete."""
    imagenet = importlib.import_module("torchvision.datasets.imagenet")
    unpack = {"train": imagenet.parse_train_archive, "val": imagenet.parse_val_archive}
    try:
        with redirect_stdout(sys.stderr), _lock(root):
            for part in [name for name in unpack if not (root / name).is_dir()]:
                if part == "val":
                    imagenet.parse_devkit_archive(str(root))
                partial = root / f".{part}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                unpack[part](str(root), folder=partial.name)
                partial.rename(root / part)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.root={root}: no train/ and val/ with a folder a class, nor image-net.org's archives "
            f"({error}); set data.root to where either is"
        ) from error


def _cifar(name: str, dataset: Any, size: int) -> ArrayImages:
    return ArrayImages(
        name, [dataset.data], size, labels=_labels(dataset.targets), classes=list(dataset.classes)
    )


def _stl10(root: Path, download: bool) -> tuple[Path, list[str]]:
    """Verified folder of the raw files, and the class names; the smallest part is loaded to check all."""
    kind = _torchvision().STL10
    dataset = _fetch(lambda fetch: kind(str(root), split="train", download=fetch), root, download)
    return root / kind.base_folder, list(dataset.classes)


def _stl10_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(n, 96, 96, 3), mapped, not loaded: the unlabelled part has 2.8 GB. The file is column-major."""
    flat: np.ndarray[Any, np.dtype[np.uint8]] = np.memmap(path, dtype=np.uint8, mode="r")
    return flat.reshape(-1, 3, _STL10_SIDE, _STL10_SIDE).transpose(0, 3, 2, 1)


def _stl10_labels(path: Path) -> torch.Tensor:
    return _labels(np.fromfile(path, dtype=np.uint8).astype(np.int64) - 1)  # stored from 1


def _labels(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64).copy())


def _torchvision() -> Any:
    return importlib.import_module("torchvision.datasets")


def _fetch(make: Callable[[bool], Any], root: Path, download: bool) -> Any:
    """The torchvision data set, downloaded by one process of this machine if need be."""
    # torchvision prints while it works, and stdout is for results.
    with redirect_stdout(sys.stderr):
        try:
            return make(False)
        except RuntimeError as error:
            if not download:
                raise UserError(
                    f"data.root={root}: not found or damaged, and data.download=false; set "
                    f"data.download=true, or put the unpacked files there"
                ) from error
        try:
            with _lock(root):
                return make(True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.root={root}: download failed ({error}); fetch the files elsewhere and put them there, "
                f"or use data.name=digits, which needs no network"
            ) from error


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Ranks that start together download once; the others wait, then find it done."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # not a POSIX system, where several ranks a machine are not supported either
        yield
        return
    with open(root / ".download.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

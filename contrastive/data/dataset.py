"""Open a data set by ``data.name``: training images, and labelled parts for evaluation and monitors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from contrastive.config import DataConfig, UserError
from contrastive.data.images import Images
from contrastive.data.torch_dataset import DatasetImages
from contrastive.data.wrapped import SomeImages
from contrastive.find_part import find_part
from contrastive.registry import DATASETS

GIVEN = "dataset"
"""``data.name`` of images that a Python program passed in; no config can open them again."""


@dataclass(frozen=True)
class Dataset:
    """The parts of a data set, opened once per run.

    Attributes:
        train: Images for pretraining.
        labelled: Labelled training images, to fit classifiers on; None without labels. Usually ``train``, or
            some of its rows.
        test: Labelled images to score on, none of them in ``train``; None where there are none.
        held_out_by_hash: Whether ``test`` was split off by a hash of the path, for lack of a test part.
    """

    train: Images
    labelled: Images | None = None
    test: Images | None = None
    held_out_by_hash: bool = False

    def labelled_parts(self, name: str) -> tuple[Images, Images]:
        """Return the images to fit a classifier on and those to score it on.

        Args:
            name: ``data.name``, for the message.

        Raises:
            UserError: one of them is missing.
        """
        if self.labelled is None or self.test is None:
            lacks, needed = ("labels", "some") if self.labelled is None else ("test part", "one")
            source = "clips" if self.train.are_videos else "imagefolder"
            raise UserError(
                f"data.name={name} has no {lacks}, evaluation needs {needed}; sort the "
                f"{self.train.noun} into one folder a class and use data.name={source}, or evaluate on "
                "another set with data.name and data.root"
            )
        return self.labelled, self.test


def open_dataset(data: DataConfig) -> Dataset:
    """Open the data set that ``data.name`` names in the registry.

    Raises:
        UserError: unknown name, missing or wrong ``data.root``, no images, a missing package.
    """
    if data.name == GIVEN:
        raise UserError(
            f"data.name={GIVEN}: these images were given by a Python program, and no setting opens them; set "
            "data.name and data.root to other images, or give them again from Python: "
            "pretrain(config, images=...), evaluate(protocol, config, dataset=...)"
        )
    opened: Dataset = find_part("data.name", DATASETS, data.name)(data)
    _check_frames(opened.train, data)
    _set_white(opened, data.white)
    return opened


def _set_white(dataset: Dataset, white: int) -> None:
    for part in (dataset.train, dataset.labelled, dataset.test):
        if part is not None:
            part.white = white


def _check_frames(images: Images, data: DataConfig) -> None:
    """Raise UserError unless ``data.frames`` is that of clips, or 1 for images and frames of videos."""
    if not images.frames and data.frames > 1:
        raise UserError(
            f"data.frames={data.frames}: data.name={data.name} has images, not videos; pretrain without "
            "data.frames, or use data.name=clips (an encoder of clips is evaluated on clips)"
        )
    if images.frames and data.frames < 2:
        raise UserError(
            f"data.frames={data.frames}: an encoder of images sees one frame of a video, and data.name="
            f"{data.name} gives {images.frames}; set data.clips_per_video=1, or pretrain on clips with "
            "e.g. data.frames=8"
        )


def as_dataset(images: Any, data: DataConfig) -> Dataset:
    """Wrap the images of a Python program: a Dataset, an Images, or a map-style torch Dataset.

    Args:
        images: One of these.
        data: Its ``stored_size``, the side of the decoded square, and ``frames`` are compared; its ``white``
            is used.

    Raises:
        UserError: the data set has no length, or its images have another size.
    """
    size = data.stored_size
    dataset = images if isinstance(images, Dataset) else _wrap(images, size)
    _check_frames(dataset.train, data)
    for part in (dataset.train, dataset.labelled, dataset.test):
        if part is not None and part.size != size:
            raise UserError(
                f"the images given are squares of {part.size} px, the settings ask for {size} px; give "
                f"images of that size, or pretrain with data.decode_size={part.size}"
            )
    _set_white(dataset, data.white)
    return dataset


def _wrap(images: Any, size: int) -> Dataset:
    if isinstance(images, IterableDataset) or not hasattr(images, "__len__"):
        raise UserError(
            f"images={type(images).__name__}: rows need numbers; give a map-style Dataset, with __len__ and "
            "__getitem__"
        )
    train = images if isinstance(images, Images) else DatasetImages(images, size)
    return Dataset(train, _with_known_labels(train))


def _with_known_labels(images: Images) -> Images | None:
    if images.labels is None:
        return None
    known = (images.labels >= 0).nonzero()[:, 0]
    return images if len(known) == len(images) else SomeImages(images, known) if len(known) else None


def root_of(data: DataConfig) -> Path:
    """Return ``data.root``.

    Raises:
        UserError: it is not set.
    """
    if not data.root:
        raise UserError(
            f"data.root is not set (~ alone is yaml for that), data.name={data.name} needs a folder; "
            "add data.root=PATH"
        )
    return Path(data.root)

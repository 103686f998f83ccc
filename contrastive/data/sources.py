"""From ``data.name`` to images: the pretraining rows, and the labelled parts that evaluation uses."""

import difflib
from collections.abc import Callable
from pathlib import Path

from contrastive.config import DataConfig, UserError
from contrastive.data import files, published
from contrastive.data.decode import Unreadable
from contrastive.data.images import ArrayImages, DatasetImages, FileImages, Images
from contrastive.data.published import open_digits

__all__ = [
    "SOURCES",
    "ArrayImages",
    "DatasetImages",
    "FileImages",
    "Images",
    "Unreadable",
    "open_eval",
    "open_held_out",
    "open_labelled_train",
    "open_train",
]

# Pretraining part and, where there are labels, (part to fit on, part to score on, held out by hash).
Labelled = tuple[Images, Images, bool]


def open_train(data: DataConfig) -> Images:
    """The rows that pretraining sees, by ``data.name``.

    - ``digits``: 1,335 of scikit-learn's handwritten digits;
    - ``cifar10``, ``cifar100``: the official 50,000;
    - ``stl10``: the labelled 5,000 (first, as in publications) and the unlabelled 100,000;
    - ``imagenet``: the official 1,281,167 of ILSVRC 2012;
    - ``imagefolder``: the training part of a folder of class folders (``files.open_class_folders``);
    - ``images``: all image files below a folder.

    Raises:
        UserError: unknown name, no or a wrong ``data.root``, no images, a missing package.
    """
    return _source(data).train(data)


def open_eval(data: DataConfig) -> tuple[Images, Images, bool]:
    """Labelled images to fit on, to score on, and whether the latter were held out by a hash.

    The second part is never among the rows of ``open_train``.

    Raises:
        UserError: as ``open_train``, and where the source has no labels.
    """
    source = _source(data)
    if source.labelled is None:
        raise UserError(
            f"data.name={data.name} has no labels, evaluation needs some; sort the images into one folder "
            f"a class and use data.name=imagefolder, or evaluate on another set with data.name and data.root"
        )
    return source.labelled(data)


def open_held_out(data: DataConfig) -> Images | None:
    """Labelled images that pretraining never sees, for monitors; None where the source has no labels.

    Raises:
        UserError: as ``open_train``.
    """
    return None if _source(data).labelled is None else open_eval(data)[1]


def open_labelled_train(data: DataConfig) -> Images | None:
    """The labelled part to fit on, for monitors that leave the test part alone; None without labels.

    Its rows are those of ``open_train``, except for ``stl10``, of which only the first 5,000 have labels.

    Raises:
        UserError: as ``open_train``.
    """
    return None if _source(data).labelled is None else open_eval(data)[0]


class Source:
    """How one ``data.name`` is opened; ``labelled`` is None where there are no labels."""

    def __init__(
        self, train: Callable[[DataConfig], Images], labelled: Callable[[DataConfig], Labelled] | None
    ) -> None:
        self.train, self.labelled = train, labelled


def _digits(data: DataConfig) -> Labelled:
    return *open_digits(data.stored_size), False


def _imagefolder(data: DataConfig) -> Labelled:
    return files.open_class_folders(_root(data), data.stored_size)


def _images(data: DataConfig) -> Images:
    return files.open_tree(_root(data), data.stored_size)


def _cifar10(data: DataConfig) -> Labelled:
    return *published.open_cifar(10, _root(data), data.stored_size, data.download), False


def _cifar100(data: DataConfig) -> Labelled:
    return *published.open_cifar(100, _root(data), data.stored_size, data.download), False


def _stl10(data: DataConfig) -> Labelled:
    return *published.open_stl10(_root(data), data.stored_size, data.download), False


def _stl10_train(data: DataConfig) -> Images:
    return published.open_stl10_unlabelled(_root(data), data.stored_size, data.download)


def _imagenet(data: DataConfig) -> Labelled:
    return *published.open_imagenet(_root(data), data.stored_size), False


def _train_of(labelled: Callable[[DataConfig], Labelled]) -> Callable[[DataConfig], Images]:
    return lambda data: labelled(data)[0]


SOURCES = {
    "digits": Source(_train_of(_digits), _digits),
    "imagefolder": Source(_train_of(_imagefolder), _imagefolder),
    "images": Source(_images, None),
    "cifar10": Source(_train_of(_cifar10), _cifar10),
    "cifar100": Source(_train_of(_cifar100), _cifar100),
    "stl10": Source(_stl10_train, _stl10),
    "imagenet": Source(_train_of(_imagenet), _imagenet),
}


def _source(data: DataConfig) -> Source:
    if data.name in SOURCES:
        return SOURCES[data.name]
    close = difflib.get_close_matches(data.name.lower(), SOURCES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"data.name={data.name!r}: unknown; {hint}allowed are {', '.join(SOURCES)}")


def _root(data: DataConfig) -> Path:
    if not data.root:
        raise UserError(
            f"data.root is not set (~ alone is yaml for that), data.name={data.name} needs a folder; "
            "add data.root=PATH"
        )
    return Path(data.root).expanduser()

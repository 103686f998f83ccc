"""``data.name=hf``: a map-style data set of the ``datasets`` library, from a folder or its cache."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset
from contrastive.data.decode import Encoded, Unreadable, explain_unreadable, why_unreadable
from contrastive.data.encoded import BatchedImages, written
from contrastive.data.files import IMAGE, describe_untrained

_TRAIN = ("train", "training")
_TESTS = ("validation", "valid", "val", "test")
_STRINGS = ("string", "large_string")
_PIECE = 1024  # rows whose lengths are looked up together


class HfImages(BatchedImages):
    """The images of one split, as they are encoded in its table.

    Args:
        table: A ``datasets.Dataset``.
        split: Its name, for keys.
        size: Side of the decoded square.
        image: Column of the images, or of the paths of their files.
        label: Column of the labels; None without labels.
        folder: Folder that paths are relative to.

    Raises:
        UserError: the column of images holds something else.
    """

    def __init__(
        self, table: Any, split: str, size: int, image: str, label: str | None, folder: str = ""
    ) -> None:
        from datasets import ClassLabel, Image
        from pyarrow import ArrowException

        self.size, self._split, self._column, self._folder = size, split, image, folder
        try:  # the stored bytes, not a decoded picture
            self._images = table.select_columns([image]).cast_column(image, Image(decode=False))
        except (ArrowException, TypeError) as error:
            raise UserError(
                f"data.hf.image={image}: this column holds no images; split {split} has {_described(table)}"
            ) from error
        if label is not None:
            self.labels = torch.tensor([-1 if at is None else int(at) for at in table[label]])
            names = table.features[label].names if isinstance(table.features[label], ClassLabel) else None
            self.classes = names or [str(number) for number in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self._images)

    def open_many(self, rows: Sequence[int]) -> Iterator[Encoded | Unreadable]:
        """See BatchedImages; one look-up in the table."""
        for item in self._images[list(rows)][self._column] if rows else ():
            try:
                with explain_unreadable():
                    yield _open(item, self._folder)
            except Unreadable as error:
                yield error

    def key(self, row: int) -> str:
        """Return ``SPLIT/ROW``."""
        return f"{self._split}/{row}"

    def stamp(self, row: int) -> str:
        """Return the size in bytes of the encoded image, also of a file; ``unreadable`` if there is none."""
        length = self._lengths[row]
        if length is not None:
            return str(length)
        path = self._file(row)
        return written(path).partition(" ")[0] if path else "unreadable"

    def content(self, row: int) -> str:
        """Hash the encoded bytes, to 64 bits in hex."""
        try:
            with explain_unreadable(), self.open(row) as file:
                return hashlib.sha256(file.read()).hexdigest()[:16]
        except Unreadable:
            return "unreadable"

    def version(self, row: int) -> str:
        """Return the table's own fingerprint, and the stamp; of a file, see ``written``."""
        path = self._file(row) if self._lengths[row] is None else None
        return f"{self._images._fingerprint} {self.stamp(row) if path is None else written(path)}"

    def _file(self, row: int) -> str | None:
        return _path(self._images[row][self._column], self._folder)

    @cached_property
    def _lengths(self) -> list[int | None]:
        from pyarrow import compute

        pieces = self._images.with_format("arrow").iter(_PIECE)
        columns = (compute.struct_field(piece[self._column], "bytes") for piece in pieces)
        return [length for column in columns for length in compute.binary_length(column).to_pylist()]


def open_hf(data: DataConfig) -> Dataset:
    """Open the data set at ``data.root``: a folder written by ``save_to_disk``, or a name in the cache.

    Its split ``train`` is pretrained on; ``validation`` or ``test``, if it has labels, is for scores.

    Raises:
        UserError: ``datasets`` is not installed, no such data set, no such column, or one of another type.
    """
    splits = _load(data)
    train = next((name for name in _TRAIN if name in splits), next(iter(splits)))
    test = next((name for name in _TESTS if name in splits and name != train), None)
    parts = [_images(splits[name], name, data) for name in (train, test) if name is not None]
    labelled = parts[0] if parts[0].labels is not None else None
    if labelled is None or test is None or parts[1].labels is None:
        return Dataset(parts[0], labelled)
    names = [
        [str(label) for label in part.labels.tolist() if label >= 0]
        for part in parts
        if part.labels is not None
    ]
    if untrained := describe_untrained(*names):
        raise UserError(f"data.root={data.root}: {untrained}; both splits need the same classes")
    return Dataset(parts[0], labelled, parts[1])


def _load(data: DataConfig) -> dict[str, Any]:
    """Return the splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.name=hf: datasets is not installed; run pip install 'contrastive-pretrain[hf]'"
        ) from error
    if not data.root:
        raise UserError("data.root is not set, data.name=hf needs a folder or a name; add data.root=PATH")
    try:
        if Path(data.root).is_dir():
            found = datasets.load_from_disk(data.root)
        else:
            only_local = datasets.DownloadConfig(local_files_only=not data.download)
            found = datasets.load_dataset(data.root, download_config=only_local)
    except Exception as error:  # the library raises a dozen types
        raise UserError(
            f"data.root={data.root}: no data set that datasets can load ({error}); give a folder written by "
            "save_to_disk, or a name of the hub"
        ) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _images(table: Any, split: str, data: DataConfig) -> HfImages:
    from datasets import ClassLabel, Image

    columns = data.hf
    image = columns.image or _only(table, Image, "image") or _only_paths(table)
    if image is None:
        raise UserError(
            f"split {split}: no column of images, or of paths of image files, or several "
            f"({_described(table)}); name one with data.hf.image"
        )
    label = columns.label or _only(table, ClassLabel, "label")
    for setting, name in (("image", image), ("label", label)):
        if name is not None and name not in table.features:
            raise UserError(f"data.hf.{setting}={name}: split {split} has {_described(table)}")
    if label is not None and not _is_whole(table.features[label]):
        raise UserError(
            f"data.hf.label={label}: this column holds no class numbers; split {split} has "
            f"{_described(table)}"
        )
    if not len(table):
        raise UserError(f"split {split} has no rows")
    folder = data.root if data.root and Path(data.root).is_dir() else ""
    return HfImages(table, split, data.stored_size, image, label, folder)


def _only(table: Any, kind: type, preferred: str) -> str | None:
    """Return the only column of this kind, or the one of the usual name among several."""
    found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    return found[0] if len(found) == 1 else preferred if preferred in found else None


def _only_paths(table: Any) -> str | None:
    """Return the only column of strings whose first one is named as image files are."""
    strings = [name for name, feature in table.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    found = [name for name in strings if len(table) and IMAGE.holds(str(table[0][name]).encode())]
    return found[0] if len(found) == 1 else None


def _is_whole(feature: Any) -> bool:
    """Return whether a column is of whole numbers: those of named classes, or plain ones."""
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))


def _described(table: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())


def _open(item: dict[str, Any] | None, folder: str) -> Encoded:
    if item is not None and item["bytes"] is not None:
        return io.BytesIO(item["bytes"])
    path = _path(item, folder)
    if path is None:
        raise Unreadable("no image in this row")
    try:
        return open(path, "rb")
    except OSError as error:
        raise Unreadable(f"{path}: {why_unreadable(error)}") from error


def _path(item: dict[str, Any] | None, folder: str) -> str | None:
    return None if item is None or item["path"] is None else os.path.join(folder, item["path"])

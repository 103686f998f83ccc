"""``data.name=shards``: images in indexed tar shards, on a disk or behind a URL."""

import bisect
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset
from contrastive.data.decode import Encoded, Unreadable
from contrastive.data.encoded import BatchedImages
from contrastive.data.files import describe_untrained, is_held_out, shorten
from contrastive.data.names import printable
from contrastive.data.shards.index import (
    SET_FILE,
    SUFFIX,
    Index,
    ShardSet,
    concatenate,
    hash_bytes,
    join,
    load_index,
    read_set,
)
from contrastive.data.shards.ranges import Place, Ranges, Span, check_url, is_local
from contrastive.data.wrapped import SomeImages

_TEST_PARTS = ("val", "test")


class ShardImages(BatchedImages):
    """The samples of a shard set, in the order of its list.

    Each sample is compared with its hash when it is read, so an altered shard gives unreadable rows, never
    other images.

    Args:
        root: Folder or URL of the set.
        found: Its list.
        ranges: Reads bytes.
        size: Side of the decoded square.

    Raises:
        UserError: a shard or its index is missing, or another than that of the list.
    """

    def __init__(self, root: str, found: ShardSet, ranges: Ranges, size: int) -> None:
        self.root, self.size, self._ranges = root, size, ranges
        places = [Place(join(root, entry.name), entry.size, entry.index) for entry in found.shards]
        _check_local(root, places)
        indices = _read_indices(root, found, ranges)
        self._places, self._names = places, [entry.base for entry in found.shards]
        self._starts = [0, *itertools.accumulate(map(len, indices))]
        self._index = concatenate(indices)
        if (self._index.labels >= 0).any():
            self.labels = torch.from_numpy(self._index.labels)
            self.classes = found.classes or [str(label) for label in range(int(self._index.labels.max()) + 1)]
            if len(self.classes) <= int(self._index.labels.max()):
                raise UserError(
                    f"data.root={root}: label {int(self._index.labels.max())}, but {SET_FILE} names "
                    f"{len(self.classes)} classes; correct its classes"
                )

    def __len__(self) -> int:
        return len(self._index)

    def open_many(self, rows: Sequence[int]) -> Iterator[Encoded | Unreadable]:
        """See BatchedImages; neighbouring samples are read together."""
        spans = [self._span(row) for row in rows]
        for row, span, answer in zip(rows, spans, self._ranges.read(spans), strict=True):
            if isinstance(answer, bytes) and not self._is_intact(row, answer):
                self._ranges.forget([span])
                (answer,) = self._ranges.read([span])
            if isinstance(answer, bytes) and not self._is_intact(row, answer):
                answer = Unreadable("differs from its hash in the index: the shard was altered")
            yield answer if isinstance(answer, Unreadable) else io.BytesIO(answer)

    def key(self, row: int) -> str:
        """Return ``SHARD/MEMBER``: the name of the tar file, and that of the image in it."""
        return f"{self._names[self._shard(row)]}/{printable(self._index.names[row])}"

    def stamp(self, row: int) -> str:
        """Return the hash of the image's bytes, as the index has it."""
        return self._hash(row).hex()

    def member(self, row: int) -> bytes:
        """Return the name of the image within its shard."""
        return self._index.names[row]

    def _span(self, row: int) -> Span:
        start = int(self._index.offsets[row])
        return Span(self._places[self._shard(row)], start, start + int(self._index.sizes[row]))

    def _shard(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row) - 1

    def _is_intact(self, row: int, data: bytes) -> bool:
        return hash_bytes(data) == self._hash(row)

    def _hash(self, row: int) -> bytes:
        found: bytes = self._index.hashes[row].tobytes()
        return found


def open_shards(data: DataConfig) -> Dataset:
    """Open the shard set at ``data.root``, or its parts ``train`` beside ``val`` or ``test``.

    Of a labelled set without parts, images are held out by a hash of their name, as of a folder.

    Raises:
        UserError: no such set, damaged lists or indices, missing shards, no fsspec for a URL.
    """
    if not data.root:
        raise UserError("data.root is not set, data.name=shards needs a folder or a URL; add data.root=PATH")
    root, ranges = check_url(data.root), Ranges(data.remote)
    whole = _open_set(root, ranges, data.stored_size)
    if whole is not None:
        return _split(whole[0])
    train = _open_set(f"{root}/train", ranges, data.stored_size)
    if train is None:
        raise UserError(
            f"data.root={root}: no {SET_FILE} in it, nor in its train/; make it with contrastive-shards "
            f"index {root} from tar files that are there, or with contrastive-shards pack from images"
        )
    tests = (_open_set(f"{root}/{part}", ranges, data.stored_size) for part in _TEST_PARTS)
    test = next((test for test in tests if test is not None), None)
    labelled = train[0] if train[0].labels is not None else None
    if test is None or labelled is None or test[0].labels is None:
        return Dataset(train[0], labelled)
    _check_classes(root, labelled, test[0])
    return Dataset(train[0], labelled, test[0], test[1].held_out_by_hash)


def _open_set(root: str, ranges: Ranges, size: int) -> tuple[ShardImages, ShardSet] | None:
    found = read_set(ranges, root)
    return None if found is None else (ShardImages(root, found, ranges, size), found)


def _split(images: ShardImages) -> Dataset:
    """Hold out some images of a labelled set."""
    if images.labels is None:
        return Dataset(images)
    held_out = torch.tensor([is_held_out(images.member(row)) for row in range(len(images))])
    train, test = (SomeImages(images, rows.nonzero()[:, 0]) for rows in (~held_out, held_out))
    if not len(train) or not len(test):
        whole, _, name = images.root.rpartition("/")
        remedy = "add images, or pack them as train and test"
        if name in ("train", *_TEST_PARTS):
            remedy = f"it is a part of a set that was split by this hash: use data.root={whole or '.'}"
        raise UserError(
            f"data.root={images.root}: all {len(images)} images fell into one part by the hash of their "
            f"name; {remedy}"
        )
    return Dataset(train, train, test, held_out_by_hash=True)


def _check_classes(root: str, train: ShardImages, test: ShardImages) -> None:
    assert train.classes is not None
    assert test.classes is not None
    longest = max(train.classes, test.classes, key=len)
    if any(part.classes != longest[: len(part.classes or ())] for part in (train, test)):
        raise UserError(
            f"data.root={root}: train and test name different classes in their {SET_FILE}; pack both again "
            "from the images, or, if one was lost and indexed anew, copy the classes of the other into it"
        )
    train.classes = test.classes = longest
    if untrained := describe_untrained(*map(_class_names, (train, test))):
        raise UserError(f"data.root={root}: {untrained}; both parts need the same classes")


def _class_names(images: ShardImages) -> list[str]:
    assert images.labels is not None
    assert images.classes is not None
    return [images.classes[label] for label in images.labels.tolist() if label >= 0]


def _check_local(root: str, places: Sequence[Place]) -> None:
    """Refuse shards on a disk that are missing or have another size; of those behind a URL, reads tell."""
    missing = [place.url for place in places if place.is_local and not os.path.isfile(place.url)]
    if missing:
        listed = {os.path.basename(place.url) for place in places}
        others = [path.name for path in sorted(Path(root).glob("*.tar")) if path.name not in listed]
        new = f", and {shorten(others)} not in the list (renamed?)" if is_local(root) and others else ""
        raise UserError(
            f"data.root={root}: {len(missing)} of {len(places)} shards are missing "
            f"({shorten([os.path.basename(path) for path in missing])}){new}; restore them, or run "
            "contrastive-shards index again"
        )
    altered = [place for place in places if place.is_local and os.path.getsize(place.url) != place.size]
    if altered:
        raise UserError(
            f"data.root={root}: {shorten([os.path.basename(place.url) for place in altered])}: "
            f"{os.path.getsize(altered[0].url)} bytes, {altered[0].size} when it was indexed; restore "
            "it, or run contrastive-shards index again"
        )


def _read_indices(root: str, found: ShardSet, ranges: Ranges) -> list[Index]:
    try:
        contents = ranges.wholes([f"{root}/{entry.base}{SUFFIX}" for entry in found.shards])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such index; run contrastive-shards index again") from error
    return [load_index(data, entry) for data, entry in zip(contents, found.shards, strict=True)]

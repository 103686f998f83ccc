"""The index of a tar shard: where each sample's image lies, its hash and its label; and the list of a set."""

import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.config import UserError
from contrastive.data.decode import Encoded
from contrastive.data.files import EXTENSIONS, log_once
from contrastive.data.names import Names
from contrastive.data.shards.ranges import Ranges, is_local
from memory_bank.replacing import replacing, write_text

SUFFIX = ".npz"
"""Appended to a shard's name, for that of its index."""

SET_FILE = "shards.json"
"""Lists the shards of a set, in the order of the rows."""

MOST_CLASSES = 100_000  # larger numbers are ids of something else

HASH_BYTES = 16
_FORMAT = 1
_ARRAYS = ("text", "ends", "offsets", "sizes", "hashes", "labels")
# WebDataset's rule: the key is all up to the first dot of the base name, the rest is the extension.
_KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")


@dataclass
class Index:
    """The samples of one shard, in its order.

    Attributes:
        names: The image's member name of each.
        offsets: Where its bytes begin in the shard, int64.
        sizes: How many they are, int64.
        hashes: The first 16 bytes of their SHA-256, uint8 (n, 16).
        labels: int64; -1 without one.
    """

    names: Names
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    hashes: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.names)

    def repeated(self) -> list[str]:
        """List the images whose key is that of an image before them."""
        used: set[str] = set()
        repeated = []
        for name in (os.fsdecode(self.names[row]) for row in range(len(self))):
            folder, slash, base = name.rpartition("/")
            key = folder + slash + base.partition(".")[0]
            repeated += [name] if key in used else []
            used.add(key)
        return repeated

    def to_bytes(self) -> bytes:
        """Serialise it: the content of the file beside the shard."""
        buffer = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS[2:]}
        np.savez(buffer, text=self.names.text, ends=self.names.ends, **arrays)
        return buffer.getvalue()


@dataclass
class ShardEntry:
    """A shard of a set.

    Attributes:
        name: Path or URL; relative ones lie beside the list.
        size: Bytes.
        samples: Rows.
        index: SHA-256 of its index file, in hex.
    """

    name: str
    size: int
    samples: int
    index: str

    @property
    def base(self) -> str:
        """Its name without folders."""
        return self.name.rsplit("/", 1)[-1]


@dataclass
class ShardSet:
    """The content of shards.json.

    Attributes:
        shards: In the order of the rows.
        classes: Names of the classes by label; None numbers them.
        held_out_by_hash: Whether these images were held out by a hash of their path, for lack of a test part.
    """

    shards: list[ShardEntry]
    classes: list[str] | None = None
    held_out_by_hash: bool = False
    format: int = field(default=_FORMAT)


def join(root: str, name: str) -> str:
    """Return where ``name`` lies: as it is if it is absolute, else beside ``root``."""
    return name if not is_local(name) or name.startswith("/") else f"{root}/{name}"


def hash_bytes(data: bytes) -> bytes:
    """Return the hash that an index holds."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def scan(file: Encoded, name: str) -> Index:
    """Read a whole tar file, and index its samples.

    Members that follow each other and have the same key (all up to the first dot of the base name) are a
    sample, as in the webdataset package; its first image counts, its ``cls`` is the label, and a sample
    without an image is left out.

    Args:
        file: Seekable or not.
        name: Of the shard, for messages.

    Raises:
        UserError: not a tar file, compressed, truncated, no image in it, or a label that is no number.
    """
    rows: list[tuple[bytes, int, int, bytes, int]] = []
    left_out = 0
    for _, members in groupby(_members(file, name), key=lambda member: member.key):
        sample = list(members)
        images = [member for member in sample if member.is_image]
        left_out += not images
        for image in images[:1]:
            label = next((member.label(name) for member in sample if member.extension == "cls"), -1)
            rows.append((image.name, image.offset, image.size, image.hash, label))
    if not rows:
        raise UserError(f"{name}: no sample with an image in it; looked for {' '.join(EXTENSIONS)}")
    if left_out:
        log_once(f"{name}: {left_out} sample{'s' * (left_out != 1)} without an image left out")
    names, offsets, sizes, hashes, labels = zip(*rows, strict=True)
    return Index(
        Names.of(names),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES),
        np.array(labels, dtype=np.int64),
    )


def load_index(data: bytes, entry: ShardEntry) -> Index:
    """Read an index file.

    Raises:
        UserError: it is damaged, or not the one that the set's list names.
    """
    damaged = (
        f"{entry.name}{SUFFIX}: damaged, or not the index of this set; run contrastive-shards index again"
    )
    if hashlib.sha256(data).hexdigest() != entry.index:
        raise UserError(damaged)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            text, ends, offsets, sizes, hashes, labels = (arrays[name] for name in _ARRAYS)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(damaged) from error
    lengths = {len(ends), len(offsets), len(sizes), len(hashes), len(labels)}
    if lengths != {entry.samples} or (offsets < 0).any() or (offsets + sizes > entry.size).any():
        raise UserError(damaged)
    return Index(Names(text, ends), offsets, sizes, hashes, labels)


def read_set(ranges: Ranges, root: str) -> ShardSet | None:
    """Read the list of a set; None if ``root`` has none.

    Raises:
        UserError: it is damaged, or of a later release.
    """
    data = ranges.whole(f"{root}/{SET_FILE}")
    if data is None:
        return None
    try:
        fields = json.loads(data)
        fields["shards"] = [ShardEntry(**entry) for entry in fields["shards"]]
        found = ShardSet(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{root}/{SET_FILE}: damaged; run contrastive-shards index again") from error
    if found.format != _FORMAT:
        raise UserError(
            f"{root}/{SET_FILE}: format {found.format}, this release reads {_FORMAT}; install the release "
            "that wrote it, or run contrastive-shards index again"
        )
    return found


def write_set(folder: Path, found: ShardSet) -> None:
    """Write the list of a set, atomically."""
    write_text(folder / SET_FILE, json.dumps(asdict(found), indent=1) + "\n")


def write_index(folder: Path, name: str, size: int, index: Index) -> ShardEntry:
    """Write the index of the shard ``name`` of ``size`` bytes; return its entry in the list."""
    data = index.to_bytes()
    entry = ShardEntry(name, size, len(index), hashlib.sha256(data).hexdigest())
    with replacing(folder / f"{entry.base}{SUFFIX}") as partial:
        partial.write_bytes(data)
    return entry


@dataclass
class _Member:
    """A file in a tar file; ``content`` is kept of labels only."""

    key: str
    extension: str
    name: bytes
    offset: int
    size: int
    hash: bytes
    content: bytes

    @property
    def is_image(self) -> bool:
        return f".{self.extension.rsplit('.', 1)[-1]}" in EXTENSIONS

    def label(self, shard: str) -> int:
        try:
            label = int(self.content)
        except ValueError:
            label = MOST_CLASSES
        if not label < MOST_CLASSES:
            raise UserError(
                f"{shard}: {self.key}.cls holds {self.content[:20]!r}; a class number below {MOST_CLASSES} "
                "is needed, or a negative one for no class"
            )
        return max(label, -1)


def _members(file: Encoded, name: str) -> Iterator[_Member]:
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for info in tar:
                found = _KEY.match(info.name)
                if not info.isreg() or found is None:
                    continue
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
                if len(data) != info.size:
                    raise UserError(f"{name}: ends within {info.name}; fetch or write the shard again")
                extension = found[2].lower()
                yield _Member(
                    found[1],
                    extension,
                    info.name.encode("utf-8", "surrogateescape"),
                    info.offset_data,
                    info.size,
                    hash_bytes(data),
                    data if extension == "cls" else b"",
                )
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{name}: not a whole, uncompressed tar file ({error}); unpack a compressed one, fetch "
            "or write a damaged one again"
        ) from error


def concatenate(indices: Iterable[Index]) -> Index:
    """Join the indices of several shards; offsets stay those within each."""
    parts = list(indices)
    starts = np.cumsum([0] + [len(part.names.text) for part in parts])
    names = Names(
        np.concatenate([part.names.text for part in parts]),
        np.concatenate([part.names.ends + start for part, start in zip(parts, starts, strict=False)]),
    )
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS[2:])
    return Index(names, *joined)

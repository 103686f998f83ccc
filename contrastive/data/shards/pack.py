"""Write images into indexed tar shards, index shards that are there, and compare shards with their index."""

import io
import itertools
import json
import logging
import os
import tarfile
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from contrastive.config import RemoteConfig, UserError
from contrastive.data.decode import Encoded, Unreadable, decode_file, explain_unreadable, ignore_warnings
from contrastive.data.encoded import EncodedImages
from contrastive.data.files import EXTENSIONS
from contrastive.data.images import Images
from contrastive.data.shards.index import (
    SET_FILE,
    SUFFIX,
    Index,
    ShardEntry,
    ShardSet,
    hash_bytes,
    join,
    load_index,
    read_set,
    scan,
    write_index,
    write_set,
)
from contrastive.data.shards.ranges import Place, RangeFile, Ranges, Span, is_local
from contrastive.data.wrapped import stored_at
from memory_bank.draw import permuted
from memory_bank.replacing import replacing

logger = logging.getLogger(__name__)

_BUFFER = 8 * 2**20  # bytes of one request while a whole shard is read


def pack(
    images: Images, folder: Path, *, shard_bytes: int, shuffle: bool, held_out: bool = False
) -> ShardSet:
    """Write ``images`` into shards below ``folder``, with their labels, index and list.

    Encoded images are copied as they are, others written as PNG. One that cannot be read, as training reads
    it, is left out with a warning that names it and says why. That takes one decode an image, at
    ``images.size``.

    Args:
        images: Any source.
        folder: Created if missing.
        shard_bytes: Size at which the next shard begins.
        shuffle: Write them in a random order, always the same: neighbours in a shard are then no more alike
            than others, and ``data.order=blocks`` loses nothing by reading them together.
        held_out: Whether they were held out by a hash.

    Raises:
        UserError: the folder already has shards or a list of them, or cannot be written; clips.
    """
    if images.are_videos:
        raise UserError("shards hold images, not clips; train on the folder with data.name=clips")
    if (folder / SET_FILE).exists() or any(folder.glob("shard-*.tar")):
        raise UserError(
            f"{folder}: has shards, complete or of an interrupted run; choose another folder, or remove it"
        )
    rows = torch.arange(len(images))
    rows = permuted(rows, len(images), 0) if shuffle and len(images) else rows
    samples = _samples(images, rows.tolist())
    entries: list[ShardEntry] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            ignore_warnings()
            for members in _shards(samples, shard_bytes):
                path = folder / f"shard-{len(entries):06}.tar"
                _write_tar(path, members)
                entries.append(index_shard(Ranges(RemoteConfig()), str(path), folder))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose a folder that can be, on a disk with "
            "room for all images"
        ) from error
    if not entries:
        raise UserError("none of the images can be read; see the warnings above")
    found = ShardSet(entries, images.classes if images.labels is not None else None, held_out)
    write_set(folder, found)
    return found


def index_shards(ranges: Ranges, urls: Sequence[str], folder: Path) -> ShardSet:
    """Index shards that are there, and write index and list into ``folder``.

    Args:
        ranges: Reads them.
        urls: Paths and URLs, in the order of the rows.
        folder: Those within are listed by their name, so that the folder may be moved or served.

    Raises:
        UserError: see ``index.scan``; also two shards of one name, or the folder cannot be written.
    """
    names = [url.rsplit("/", 1)[-1] for url in urls]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice[0]}: several shards have this name, indices would overwrite each other")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _set_before(ranges, folder)
        found = replace(before, shards=[index_shard(ranges, url, folder) for url in urls])
        write_set(folder, found)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another with out=DIR"
        ) from error
    return found


def _set_before(ranges: Ranges, folder: Path) -> ShardSet:
    """Return the set whose list is in ``folder``, for its classes; an empty one without a readable list."""
    try:
        return read_set(ranges, str(folder)) or ShardSet([])
    except UserError:
        return ShardSet([])


def index_shard(ranges: Ranges, url: str, folder: Path) -> ShardEntry:
    """Index one shard; return its entry."""
    place = Place(url, ranges.size(url), "")
    with io.BufferedReader(RangeFile(ranges, place), _BUFFER) as file:
        index = scan(cast(Encoded, file), url)
    logger.info("%s: %d samples", url, len(index))
    name = os.path.relpath(url, folder) if is_local(url) else url
    # A file elsewhere is named by its whole path: the list may be moved, what it names was not.
    return write_index(folder, os.path.abspath(url) if name.startswith("..") else name, place.size, index)


def check_set(ranges: Ranges, root: str, found: ShardSet) -> dict[str, str]:
    """Compare every sample with its hash, and its key with the others of its shard.

    Returns:
        The reason for each shard or sample that differs, or has the key of another.
    """
    problems: dict[str, str] = {}
    for entry in found.shards:
        try:
            problems |= _check_shard(ranges, root, entry)
        except (UserError, OSError) as error:
            problems[entry.name] = str(error)
    return problems


def _check_shard(ranges: Ranges, root: str, entry: ShardEntry) -> dict[str, str]:
    url = join(root, entry.name)
    size = ranges.size(url)
    if size != entry.size:
        return {entry.name: f"{size} bytes, {entry.size} when it was indexed"}
    (data,) = ranges.wholes([f"{root}/{entry.base}{SUFFIX}"])
    index = load_index(data, entry)
    problems = {f"{entry.base}/{name}": "has the key of a sample before it" for name in index.repeated()}
    place = Place(url, entry.size, entry.index)
    for rows in _runs(index):
        spans = [
            Span(place, int(at), int(at + n))
            for at, n in zip(index.offsets[rows], index.sizes[rows], strict=True)
        ]
        for row, answer in zip(range(rows.start, rows.stop), ranges.read(spans), strict=True):
            if isinstance(answer, Unreadable):
                problems[f"{entry.base}/{os.fsdecode(index.names[row])}"] = str(answer)
            elif hash_bytes(answer) != index.hashes[row].tobytes():
                problems[f"{entry.base}/{os.fsdecode(index.names[row])}"] = (
                    "differs from its hash in the index"
                )
    return problems


def _runs(index: Index) -> Iterator[slice]:
    """Yield rows in pieces of about 8 MiB."""
    start = 0
    for row in range(len(index)):
        if (
            row + 1 == len(index)
            or index.offsets[row + 1] + index.sizes[row + 1] - index.offsets[start] > _BUFFER
        ):
            yield slice(start, row + 1)
            start = row + 1


def _samples(images: Images, rows: Sequence[int]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the members of each sample: image, label, and the path where the key differs from it."""
    used: set[str] = set()
    for row in rows:
        try:
            data, suffix = _encoded(images, row)
        except Unreadable as error:
            logger.warning("%s: left out: %s", images.key(row), error)
            continue
        path = images.key(row)
        folder, _, base = path.rpartition("/")
        stem = os.path.splitext(base)[0].replace(".", "_")  # a key ends at the first dot of its base name
        key = _free_key(f"{folder}/{stem}" if folder else stem, row, used)
        used.add(key)
        members = [(f"{key}{suffix}", data)]
        if images.labels is not None and images.labels[row] >= 0:
            members.append((f"{key}.cls", str(int(images.labels[row])).encode()))
        if f"{key}{suffix}" != path:
            members.append((f"{key}.json", json.dumps({"path": path}).encode()))
        yield members


def _free_key(key: str, row: int, used: Container[str]) -> str:
    """Return ``key``; if it is in use or no name, the first free one of KEY-ROW, KEY-ROW-2, KEY-ROW-3, .."""
    named = [key] if key and not key.endswith("/") else []
    numbered = (f"{key}-{row}-{count}" for count in itertools.count(2))
    return next(free for free in chain(named, [f"{key}-{row}"], numbered) if free not in used)


def _encoded(images: Images, row: int) -> tuple[bytes, str]:
    """Return an image's file and suffix: as it is stored, or as PNG.

    Raises:
        Unreadable: training could not read it.
    """
    images, row = stored_at(images, row)
    if isinstance(images, EncodedImages):
        with explain_unreadable(), images.open(row) as file:
            data, named = file.read(), os.path.splitext(images.key(row))[1].lower()
            suffix = named if named in EXTENSIONS else _suffix_of(data)
        if suffix:
            decode_file(io.BytesIO(data), images.size)
            return data, suffix
    buffer = io.BytesIO()
    Image.fromarray(images.read(row).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _suffix_of(data: bytes) -> str | None:
    """Return the suffix of an encoded image by its header, for sources whose keys are not names of files.

    None is a format that folders are not searched for.
    """
    known = Image.registered_extensions()
    with Image.open(io.BytesIO(data)) as image:
        return next((suffix for suffix in EXTENSIONS if known.get(suffix) == image.format), None)


def _shards(
    samples: Iterator[list[tuple[str, bytes]]], shard_bytes: int
) -> Iterator[Iterator[tuple[str, bytes]]]:
    """Group samples into shards; each is to be used up before the next is asked for."""
    ahead = next(samples, None)

    def members() -> Iterator[tuple[str, bytes]]:
        nonlocal ahead
        written = 0
        while ahead is not None and written < shard_bytes:
            written += sum(1024 + len(data) for _, data in ahead)
            yield from ahead
            ahead = next(samples, None)

    while ahead is not None:
        yield members()


def _write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with replacing(path) as partial, tarfile.open(partial, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # without times and owners: the same images give the same bytes
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

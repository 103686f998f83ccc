"""Warn about test images that were pretrained on, or whose class has no training images."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from contrastive.config import DataConfig, UserError
from contrastive.data.encoded import FileImages
from contrastive.data.files import describe_untrained
from contrastive.data.image_list import ImageList, read_image_list
from contrastive.data.images import Images
from contrastive.data.names import printable
from eval.eval_data import PACKED, run_data
from eval.features import Features

# Bytes of files as large as those asked for up to which all are read; of more, those of the same names alone.
_MOST_READ = 1 << 30


def warn_of_untrained(features: Features) -> list[str]:
    """Name the classes that have readable test images but no readable training image."""
    train, test = (
        [features.classes[label] for label in part.labels.tolist()]
        for part in (features.train, features.test)
    )
    counts = describe_untrained(train, test)
    return [f"{counts}, which are right by chance at most; add images of them to train"] if counts else []


def find_pretrained(
    run: Path | None, test: Images, own: DataConfig, rows: Sequence[int]
) -> tuple[dict[str, int], list[str]]:
    """Count the scored images among those that the run was trained on.

    Files are compared by their paths and, for copies elsewhere, by content (where that means to read more
    than 1 GiB, by name and content), or by relative path and size if the run's ``data.root`` does not exist
    on this machine; samples of shards by their names and hashes; rows of tables by their numbers, where both
    are of one table.

    Args:
        run: The run directory; its manifest.csv lists those images. None if the origin is unknown.
        test: The images of the test part; arrays in memory are not looked up.
        own: Settings that they were opened with.
        rows: The rows of ``test`` that are scored, without unreadable ones: two empty files are no copies.

    Returns:
        ``count`` of ``scored``, nothing if there are none or it is not known; and warnings.
    """
    data = run_data(run)
    if run is None or data is None or data.root is None or not (run / "manifest.csv").is_file():
        return {}, []
    packed = [name for name in (data.name, own.name) if name in PACKED]
    if not packed and not isinstance(test, FileImages):
        return {}, []
    if packed and (data.name != own.name or (own.name == "hf" and data.root != own.root)):
        return {}, [
            f"not known whether test {test.noun} were pretrained on: the run read data.name={data.name} "
            f"data.root={data.root}, and they are read from data.name={own.name} data.root={own.root}, so "
            "names do not compare"
        ]
    try:
        manifest = read_image_list(run / "manifest.csv")
    except UserError as error:
        return {}, [f"not known whether test {test.noun} were pretrained on: {error}"]
    root, copied = os.path.realpath(os.path.expanduser(data.root)), 0
    if isinstance(test, FileImages) and os.path.isdir(root):
        here = os.path.realpath(os.fsdecode(test.root))
        start, own_start = (printable(os.fsencode(os.path.join(path, ""))) for path in (root, here))
        seen = {start + key for key in manifest.keys}
        sizes = {row: test.stamp(row) for row in rows if own_start + test.key(row) not in seen}
        copies = _Copies(root, manifest, {*sizes.values()})
        held = sum(copies.hold(test, row, size) for row, size in sizes.items())
        count = len(rows) - len(sizes) + held
        copied = held if here == root else 0
    else:
        known = {*zip(manifest.keys, manifest.sizes, strict=True)}
        count = sum((test.key(row), test.stamp(row)) in known for row in rows)
    if not count:
        return {}, []
    found = {"count": count, "scored": len(rows)}
    if count == copied:
        return found, [_warn_of_copies(run, test.noun, copied, len(rows))]
    instead = "pretrain with the data.name and data.root of this evaluation"
    if (own.name, own.root) == (data.name, data.root):
        instead = f"score {test.noun} that were left out of the folder that was pretrained on"
    return found, [
        f"{describe_pretrained(found, test.noun)} (manifest.csv of {run}), so the score is not of unseen "
        f"{test.noun}; {instead}"
    ]


def describe_pretrained(found: Mapping[str, int], noun: str) -> str:
    """Return, e.g., ``129 of 129 test images were pretrained on``; empty if nothing was found."""
    return f"{found['count']} of {found['scored']} test {noun} were pretrained on" if found else ""


def _warn_of_copies(run: Path, noun: str, copied: int, scored: int) -> str:
    """Say that one folder holds files in both of its parts, which no other choice of data would mend."""
    return (
        f"{copied} of {scored} test {noun} have the content of {noun} that were pretrained on "
        f"(manifest.csv of {run}): the folder holds copies in its training and its test part, so the score "
        f"is not of unseen {noun} alone; keep one of each (contrastive-eval stats lists copies), then train "
        "under another run.name"
    )


class _Copies:
    """Look up files under another root by their sizes, then by their content.

    Args:
        root: The other root.
        listed: The files under it.
        sizes: Sizes of the files that will be asked for.
    """

    def __init__(self, root: str, listed: ImageList, sizes: Set[str]) -> None:
        files = [(key, size) for key, size in zip(listed.keys, listed.sizes, strict=True) if size in sizes]
        self._by_name = sum(int(size) for _, size in files if size.isdecimal()) > _MOST_READ
        self._files: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._contents: dict[tuple[str, str], set[bytes | None]] = {}
        for key, size in files:
            self._files[self._name(key), size].append(os.path.join(root, key))

    def hold(self, images: FileImages, row: int, size: str) -> bool:
        """Return whether an image of ``size`` has the content of one of them that can still be read."""
        alike = self._name(images.key(row)), size
        if alike not in self._files:
            return False
        if alike not in self._contents:  # each file is read once
            self._contents[alike] = {_hash(path) for path in self._files[alike]} - {None}
        return _hash(os.fsdecode(images.path(row))) in self._contents[alike]

    def _name(self, key: str) -> str:
        return os.path.basename(key) if self._by_name else ""


def _hash(path: str) -> bytes | None:
    """Return the SHA-256 of a file; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None

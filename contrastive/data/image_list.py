"""Write and compare manifest.csv, the list of a run's images, so that a resume on other images is refused."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contrastive.config import UserError
from contrastive.data.files import shorten
from contrastive.data.images import Images, fingerprint
from memory_bank.replacing import replacing

_COLUMNS = ["row", "key", "size"]
_NAMED = 3


@dataclass
class ImageList:
    """The content of manifest.csv.

    Attributes:
        keys: Key of each row.
        sizes: Stamp of each row: bytes of a file, or a hash of pixels in memory.
    """

    keys: list[str]
    sizes: list[str]

    def fingerprint(self) -> str:
        """Hash keys and sizes (SHA-256); equals that of the images it was written from."""
        return fingerprint(zip(self.keys, self.sizes, strict=True))


def write_image_list(path: Path, images: Images) -> str:
    """Write row, key and size of every image as csv, atomically; return the fingerprint of the list."""

    def write_rows() -> Iterator[tuple[str, str]]:
        for row, key, size in images.manifest():
            writer.writerow((row, key, size))
            yield key, size

    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        written = fingerprint(write_rows())
    return written


def read_image_list(path: Path) -> ImageList:
    """Read a manifest.csv that ``write_image_list`` wrote.

    Raises:
        UserError: the file is missing or malformed.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: not a readable manifest ({error}); restore it from a copy of the run"
        ) from error
    if header != _COLUMNS or any(len(row) != 3 or row[0] != str(index) for index, row in enumerate(rows)):
        raise UserError(
            f"{path}: not a manifest: columns {','.join(_COLUMNS)} and rows 0, 1, 2, ... are needed; "
            f"restore it from a copy of the run"
        )
    return ImageList([row[1] for row in rows], [row[2] for row in rows])


def describe_changes(old: ImageList, images: Images) -> str:
    """Describe the changes since ``old``, e.g. ``2 added (a.png, b.png), 1 altered (c.png)``; else ""."""
    before = dict(zip(old.keys, old.sizes, strict=True))
    now = {key: size for _, key, size in images.manifest()}
    groups = {
        "added": [key for key in now if key not in before],
        "removed": [key for key in before if key not in now],
        "altered": [key for key, size in now.items() if before.get(key, size) != size],
    }
    changes = [f"{len(keys)} {change} ({shorten(keys, _NAMED)})" for change, keys in groups.items() if keys]
    if not changes and old.keys != list(now):
        return "the same images in another order"
    return ", ".join(changes)

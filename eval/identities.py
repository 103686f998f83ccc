"""Open pictures of identities: class folders in a gallery and a query part, or a table."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from contrastive.augment.corrupt import cover
from contrastive.augment.noise import uniforms
from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset, open_dataset, root_of
from contrastive.data.encoded import FileImages
from contrastive.data.files import list_images, shorten
from contrastive.data.images import Images
from contrastive.data.names import printable
from contrastive.data.wrapped import Wrapped

_PARTS = (("gallery", "query"), ("train", "test"), ("train", "val"))
_FOLDERS = ("images", "imagefolder")  # sources of image files, which are opened here by their own rule
_GREY = 128.0


class Pictures(FileImages):
    """Image files with the camera that took each.

    Attributes:
        cameras: Number of each picture's camera; None where none are known.
    """

    cameras: Int[Tensor, " n"] | None = None


def open_identities(data: DataConfig, table: str | None) -> Dataset:
    """Open the gallery as the training part, and the queries as the test part; labels are identities.

    Args:
        data: ``name`` and ``root``. Folders of image files hold ``gallery`` and ``query``, or ``train`` and
            ``test`` (or ``val``), and these one folder for each identity. Without such parts, the gallery and
            the queries are the same pictures. Another source gives its labelled parts.
        table: Table ``path,identity`` and, if wanted, ``camera`` and ``part``, instead of the folders.

    Raises:
        UserError: no such file or folder, a wrong table, a query of an identity that the gallery lacks, or,
            without parts, an identity with one picture; an encoder of clips.
    """
    if data.frames > 1:
        raise UserError(
            f"the encoder takes clips of {data.frames} frames, retrieval ranks pictures: give one of images"
        )
    if table is None and data.name not in _FOLDERS:
        return open_dataset(data)
    rows = _folder_rows(root_of(data)) if table is None else _table_rows(Path(table))
    root = root_of(data) if table is None or data.root else Path(table).parent
    split = any(row["part"] for row in rows)
    parts = (
        [[row for row in rows if row["part"] == part] for part in ("gallery", "query")] if split else [rows]
    )
    where = table if table is not None else f"data.root={root}"
    if not all(parts):
        raise UserError(f"{where}: no picture of the {'query' if parts[0] else 'gallery'} part; add some")
    _check_found(parts, where)
    paths = [row["path"] for row in rows]
    if table is not None:
        _check_there(root, paths, where)
    _check_once(root, paths, where)
    if len({row["identity"] for part in parts for row in part}) < 2:
        raise UserError(
            f"{where}: one identity only ({rows[0]['identity']}), so any picture is the right one; add "
            "pictures of others"
        )
    names = {key: sorted({row[key] for row in rows}) for key in ("identity", "camera")}
    opened = [_pictures(root, part, data, names) for part in parts]
    return Dataset(opened[0], opened[0], opened[-1])


def _folder_rows(root: Path) -> list[dict[str, str]]:
    """List pictures in folders of identities; the folder of the first part that is there decides."""
    parts = next((both for both in _PARTS if all((root / part).is_dir() for part in both)), ("",))
    rows = []
    for part, folder in zip(("gallery", "query") if len(parts) > 1 else ("",), parts, strict=True):
        for key in list_images(root / folder):
            identity, slash, _ = key.partition(b"/")
            if not slash:
                raise UserError(
                    f"{root / folder}: {printable(key)} lies in no folder of an identity; move it into "
                    "one, or say who it is with retrieval.csv"
                )
            path = os.fsdecode(os.path.join(os.fsencode(folder), key))
            rows.append({"path": path, "identity": printable(identity), "camera": "", "part": part})
    return rows


def _table_rows(file: Path) -> list[dict[str, str]]:
    rows = read_table(file, ("path", "identity"), "retrieval.csv", ("camera", "part"))
    rows = [{"camera": "", "part": ""} | row for row in rows]
    if (
        wrong := sorted({row["part"] for row in rows} - {"gallery", "query"})
        if any(r["part"] for r in rows)
        else []
    ):
        raise UserError(f"{file}: part {wrong[0]!r}; allowed are gallery and query, or no part anywhere")
    if any(row["camera"] for row in rows) and not all(row["camera"] for row in rows):
        raise UserError(f"{file}: some rows have a camera and others none; give all of them one, or none")
    return rows


def read_table(
    file: Path, columns: Sequence[str], setting: str, optional: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Read a CSV file with a header; blanks around cells are stripped.

    Args:
        file: The file.
        columns: Columns that must be there and filled in.
        setting: Name of the setting, for messages.
        optional: Columns that may be there; further ones are not read.

    Raises:
        UserError: it cannot be read, is empty, lacks one of ``columns``, or has a column twice or under a
            name that only case or blanks tell from a known one.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows, header = list(reader), reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{setting}={file}: cannot be read ({error})") from error
    given = [*header] if rows else []
    if len(given) == 1 and (other := next((mark for mark in ";\t" if mark in given[0]), None)):
        raise UserError(
            f"{setting}={file}: columns are separated by {'a tab' if other != ';' else 'semicolons'}; save "
            "the table with commas"
        )
    for name in given:
        if name != (known := name.strip().lower()) and known in (*columns, *optional):
            raise UserError(
                f"{setting}={file}: column {name!r}; write {known}, in small letters without blanks"
            )
    if twice := [name for name in (*columns, *optional) if given.count(name) > 1]:
        raise UserError(f"{setting}={file}: column {twice[0]} is there twice; take one of them out")
    if not {*columns} <= {*given}:
        raise UserError(
            f"{setting}={file}: columns {','.join(given) or 'none'}; {','.join(columns)} are "
            "needed, and one row or more"
        )
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values() or not all(row[name].strip() for name in columns):
            raise UserError(
                f"{setting}={file}, line {number}: a cell is missing; fill in {','.join(columns)}"
            )
    return [{name: cell.strip() for name, cell in row.items()} for row in rows]


def _check_found(parts: Sequence[Sequence[dict[str, str]]], where: str) -> None:
    """Raise UserError if a query has no picture to find."""
    pictures = Counter(row["identity"] for row in parts[0])
    if len(parts) == 1:
        alone = [name for name, count in pictures.items() if count == 1]
        if alone:
            raise UserError(
                f"{where}: {len(alone)} identities have one picture ({shorten(alone)}), which can find no "
                "other; add pictures of them, leave them out, or name the parts gallery and query"
            )
        return
    unknown = sorted({row["identity"] for row in parts[1]} - {*pictures})
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} identities of the query part are not in the gallery "
            f"({shorten(unknown)}); add a picture of them there, or leave their queries out"
        )


def _check_there(root: Path, paths: Sequence[str], where: str) -> None:
    """Raise UserError if a file of the table is missing."""
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise UserError(
            f"{where}: {len(missing)} files are not below {root} ({shorten(missing)}); correct the paths, or "
            "set data.root"
        )


def _check_once(root: Path, paths: Sequence[str], where: str) -> None:
    """Raise UserError if a picture is there twice, by a link or in another spelling: it would find itself."""
    spellings: dict[Any, list[str]] = {}
    for path in paths:
        spellings.setdefault(_file_of(root / path), []).append(path)
    if twice := sorted(" = ".join(dict.fromkeys(same)) for same in spellings.values() if len(same) > 1):
        raise UserError(
            f"{where}: pictures that are there twice would find themselves ({shorten(twice)}); keep each once"
        )


def _file_of(path: Path) -> Any:
    """Return what all names of one file have in common: spellings, links, and hard links."""
    try:
        found = os.stat(path)
    except OSError:  # a dangling link
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else os.path.realpath(path)


def _pictures(
    root: Path, rows: Sequence[dict[str, str]], data: DataConfig, names: dict[str, list[str]]
) -> Pictures:
    number = {key: {name: index for index, name in enumerate(values)} for key, values in names.items()}
    labels, cameras = (
        torch.tensor([number[key][row[key]] for row in rows]) for key in ("identity", "camera")
    )
    keys = [os.fsencode(row["path"]) for row in rows]
    pictures = Pictures(root, keys, data.stored_size, labels, names["identity"])
    pictures.white = data.white
    pictures.cameras = cameras if names["camera"] != [""] else None
    return pictures


class Covered(Wrapped):
    """Images of which a part is covered by a grey rectangle, at a place drawn for each.

    Args:
        source: The images.
        share: Share of the area that is covered, in (0, 1).
        seed: Decides the places.
    """

    def __init__(self, source: Images, share: float, seed: int) -> None:
        super().__init__(source)
        self.share, self.seed = share, seed

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        ratio, *place = uniforms(self.seed, 0, torch.tensor([row]), 0, 3)[0].tolist()
        width = self.share ** (0.25 + 0.5 * ratio)
        sides = torch.tensor([width, self.share / width])
        rectangle = torch.cat((torch.tensor(place) * (1 - sides), sides))[None]
        pixels = self.source.read(row)[None].float()
        return cover(pixels, rectangle, pixels.new_full((1, 1, 1, 1), _GREY))[0].to(torch.uint8)

    def stamp(self, row: int) -> str:
        """Return the image's stamp, and how it is covered."""
        return f"{super().stamp(row)} {self.share} of {self.seed} covered"

    def content(self, row: int) -> str:
        """Return the image's content, and how it is covered."""
        return f"{super().content(row)} {self.share} of {self.seed} covered"

    def version(self, row: int) -> str:
        """Return the image's version, and how it is covered."""
        return f"{super().version(row)} {self.share} of {self.seed} covered"

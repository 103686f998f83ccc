"""``data.name=images`` (any folder tree) and ``imagefolder`` (a folder for each class, split or not)."""

import hashlib
import logging
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import features
from torch import Tensor

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.encoded import FileImages
from contrastive.data.names import printable
from contrastive.slurm import is_first_task

log = logging.getLogger(__name__)

_ALWAYS = """.jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm
    .tga .pcx .sgi .qoi"""
_OPTIONAL = {"avif": ".avif", "jpg_2000": ".jp2 .j2k .j2c .jpc .jpf .jpx"}
_SUPPORTED = [feature for feature in _OPTIONAL if feature in {*features.modules, *features.codecs}]
EXTENSIONS = (
    *_ALWAYS.split(),
    *(ending for name in _SUPPORTED if features.check(name) for ending in _OPTIONAL[name].split()),
)
"""Extensions of still images that this Pillow decodes; no documents, films or float pixels."""

_BESIDE = {".db", ".ini", ".txt", ".md", ".csv", ".json", ".xml", ".xmp", ".html", ".log"}
"""Extensions of what lies beside images, as Thumbs.db and desktop.ini do: nobody takes it for one."""

HELD_OUT_SHARE = 0.2
_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("val", "validation", "valid", "dev", "test", "testing", "eval", "evaluation")
_NAMED = 5  # names in a message


@dataclass(frozen=True)
class Kind:
    """The files that make up a data set.

    Attributes:
        name: Word for one of them, in messages.
        endings: Their extensions, lower case.
        remedy: Sentence on files of other endings.
    """

    name: str
    endings: tuple[str, ...]
    remedy: str

    def holds(self, name: bytes) -> bool:
        """Return whether a file of this name is one of them."""
        return name.lower().endswith(self.coded)

    @cached_property
    def coded(self) -> tuple[bytes, ...]:
        """The endings as the file system's bytes."""
        return tuple(ending.encode() for ending in self.endings)


IMAGE = Kind("image", EXTENSIONS, "where these are images, save them as .png or .jpg")

IMAGES_A_CLASS = 5
"""Images that a class folder typically has (median); with fewer, folders are hardly classes."""


@dataclass(frozen=True)
class Layout:
    """Describe how the images below a root lie in folders that may be classes.

    Attributes:
        parts: Folder of the training part ("" is the root itself) and of the test part (None if missing).
        folders: Images in each folder that may be a class, by its name; in both parts together.
        loose: Names of the images that lie in no such folder.
    """

    parts: tuple[str, str | None]
    folders: Counter[str]
    loose: list[str]

    @property
    def in_folders(self) -> int:
        """Return the number of images in folders that may be classes."""
        return self.folders.total()

    @property
    def typical(self) -> float:
        """Return the median number of images in a folder."""
        return float(statistics.median(self.folders.values()))

    @property
    def may_be_classes(self) -> bool:
        """Return whether there are folders to tell apart, with images enough for classes."""
        return len(self.folders) > 1 and self.typical >= IMAGES_A_CLASS


@dataclass(frozen=True)
class Split:
    """The items of class folders.

    Attributes:
        train: Paths of the training part, relative to the root.
        test: Paths of the test part.
        classes: Names of the classes, sorted.
        depth: Which part of a path is the class.
        held_out_by_hash: Whether the test part was held out by a hash of the path.
    """

    train: list[bytes]
    test: list[bytes]
    classes: list[str]
    depth: int
    held_out_by_hash: bool

    def labels(self, keys: list[bytes]) -> Int[Tensor, " n"]:
        """Return the class of each path."""
        number = {name: index for index, name in enumerate(self.classes)}
        return torch.tensor([number[printable(key.split(b"/")[self.depth])] for key in keys])


def open_images(data: DataConfig) -> Dataset:
    """Open every image file below ``data.root``, unlabelled; for errors see ``open_tree``."""
    return Dataset(open_tree(root_of(data), data.stored_size))


def find_layout(root: Path) -> Layout:
    """Find out how the images below ``root`` lie in folders; for errors see ``open_tree``, ``find_parts``."""
    train, test = find_parts(root)
    keys = [key.split(b"/") for key in list_images(root)]
    parts = {part.encode() for part in (train, test) if part}
    inside = [key[1:] for key in keys if key[0] in parts] if parts else keys
    return Layout(
        (train, test),
        Counter(printable(key[0]) for key in inside if len(key) > 1),
        [printable(key[0]) for key in inside if len(key) == 1],
    )


def open_imagefolder(data: DataConfig) -> Dataset:
    """Open class folders below ``data.root``; for errors see ``open_class_folders``."""
    train, test, held_out_by_hash = open_class_folders(root_of(data), data.stored_size)
    return Dataset(train, train, test, held_out_by_hash)


def open_tree(root: Path, size: int) -> FileImages:
    """Open every image file below ``root``, unlabelled.

    Raises:
        UserError: no such folder, a folder that cannot be listed, no image file.
    """
    return FileImages(root, list_images(root), size)


def open_class_folders(root: Path, size: int) -> tuple[FileImages, FileImages, bool]:
    """Open the training part and the test part; return also whether the test part was held out by a hash.

    ``root`` holds class folders, or parts that hold them (``find_parts``). Without a test part, images are
    held out by a hash of their relative path, never by class, so that adding files moves no other file from
    one part to the other.

    Raises:
        UserError: see ``open_tree`` and ``find_parts``; also files outside of class folders, a test class
            without a training folder, an empty part.
    """
    split = split_class_folders(root)
    train, test = (
        FileImages(root, keys, size, split.labels(keys), split.classes) for keys in (split.train, split.test)
    )
    return train, test, split.held_out_by_hash


def split_class_folders(
    root: Path, kind: Kind = IMAGE, group: Callable[[list[bytes]], list[bytes]] = list
) -> Split:
    """Find the items of both parts and their classes; see ``open_class_folders``.

    Args:
        root: Folder of class folders, or of parts that hold them.
        kind: The files to look for.
        group: Turns the sorted paths of files into those of items, where an item is several files.
    """
    train, test = find_parts(root, kind)
    listings = [find_files(root / part, root, kind) for part in (train, test) if part is not None]
    _warn_of_left_out(root, sum((others for _, others in listings), Counter()), kind)
    depth = int(train != "")
    if test is not None:
        train_keys, test_keys = (group(keys) for keys, _ in listings)
    else:
        keys = group(listings[0][0])
        test_keys = [key for key in keys if is_held_out(key)]
        train_keys = [key for key in keys if not is_held_out(key)]
    if not train_keys or not test_keys:
        empty = "training" if not train_keys else "test"
        raise UserError(
            f"data.root={root}: all {len(train_keys) + len(test_keys)} {kind.name}s fell into one part "
            f"by the hash of their path, none are left for the {empty} part; add {kind.name}s, or split them "
            f"into train/ and val/"
        )
    # Without a split, classes are those of all images: every image of a rare one may be held out.
    known = train_keys if test else train_keys + test_keys
    classes = sorted({_class(key, depth, root, kind) for key in known})
    names = [[_class(key, depth, root, kind) for key in keys] for keys in (train_keys, test_keys)]
    for part in names:
        if untrained := describe_untrained(classes, part, noun=kind.name):
            raise UserError(f"data.root={root}: {untrained}; both parts need the same class folders")
    return Split(train_keys, test_keys, classes, depth, test is None)


def is_held_out(key: bytes) -> bool:
    """Decide whether an image of an unsplit folder is held out, by its relative path alone."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) < HELD_OUT_SHARE * 2**64


def describe_untrained(train: Iterable[str], test: Sequence[str], *, noun: str = "image") -> str:
    """Describe the test images of classes without a training image: no classifier can get them right.

    Args:
        train: Class of each training image.
        test: Class of each test image.
        noun: Word for one of them.

    Returns:
        One sentence; empty if there are no such images.
    """
    known = set(train)
    missed = [name for name in test if name not in known]
    if not missed:
        return ""
    classes = list(dict.fromkeys(missed))
    return (
        f"{len(missed)} of {len(test)} test {noun}s are of {len(classes)} "
        f"{'class' if len(classes) == 1 else 'classes'} without a training {noun} ({shorten(classes)})"
    )


def shorten(names: Sequence[str], most: int = _NAMED) -> str:
    """Join the first ``most`` names, followed by an ellipsis if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def find_parts(root: Path, kind: Kind = IMAGE) -> tuple[str, str | None]:
    """Find the folder of the training part ("" is ``root`` itself) and of the test part (None if missing).

    ``train`` beside ``val`` or ``test`` are parts whatever they contain (``val`` is used if both exist).
    Similar names (``Train``, ``training``; ``validation``, ``valid``, ``dev``, ``testing``, ``eval``, in any
    case) are parts if they contain class folders of the same names, since a class may be called train.
    Folders without an image are ignored.

    Raises:
        UserError: no such folder, a folder that cannot be listed, two parts that are the same folder, or
            folders that may be parts or classes.
    """
    _check_root(root, kind)
    for name in ("val", "test"):
        if (root / "train").is_dir() and (root / name).is_dir():
            return _distinct(root, "train", name)
    folders = _folders(root, kind)
    train = next((name for name in folders if name.lower() in _TRAIN_FOLDERS), None)
    if train is None:
        return "", None
    beside = {name: _folders(root / name, kind) for name in folders if name != train}
    inner = _folders(root / train, kind)
    rivals = [name for name, its in beside.items() if {*its} & {*inner} or not (its or inner)]
    tests = [name for known in _TEST_FOLDERS for name in rivals if name.lower() == known]
    if tests:
        log_once(f"data.root={root}: {tests[0]} is the test part, and {train} the training part")
        return _distinct(root, train, tests[0])
    if not inner:
        return "", None
    if not beside:
        return train, None
    if rivals:
        raise UserError(
            f"data.root={root}: {_named([train, *rivals])} hold the same class folders ({_named(inner)}), "
            f"so they may be parts of one data set, or classes; rename {_named(rivals[:1])} to val if it is "
            f"the test part, move it away if it is neither, or rename {train} if it is a class"
        )
    log_once(
        f"data.root={root}: {train} is read as one class beside {_named([*beside])}; if it is the training "
        "part, set data.root to it, or name the test part val"
    )
    return "", None


def _named(folders: Sequence[str]) -> str:
    return shorten([printable(os.fsencode(name)) for name in folders])


def _distinct(root: Path, train: str, test: str) -> tuple[str, str]:
    if (root / test).samefile(root / train):
        raise UserError(f"data.root={root}: {train} and {test} are one folder, so nothing would be held out")
    return train, test


def _folders(folder: Path, kind: Kind) -> list[str]:
    """List the visible subfolders that contain a file of ``kind``, at any depth."""
    _, entries = _scan(os.fsencode(folder))
    inner = (entry for entry in entries if _kind(entry) == "folder")
    return [os.fsdecode(entry.name) for entry in inner if holds(Path(os.fsdecode(entry.path)), kind)]


def holds(folder: Path, kind: Kind) -> bool:
    """Return whether a visible file of ``kind`` lies below ``folder``, at any depth.

    Raises:
        UserError: no such folder, a folder that cannot be listed.
    """
    _check_root(folder, kind)
    return any(kind.holds(file.name) for file in _walk(os.fsencode(folder)))


def list_images(folder: Path) -> list[bytes]:
    """List the paths of all image files below ``folder``, relative to it, sorted by their bytes.

    Links to folders are followed, but no folder is entered twice, so loops end. Hidden names (a leading
    dot) are left out, and so are pipes and devices, which would block when opened; a dangling link is kept,
    and later counted as unreadable. Files of other types are counted in one warning, unless they are of
    those that usually lie beside images (Thumbs.db, text).

    Raises:
        UserError: no such folder, a folder that cannot be listed, no image file.
    """
    return list_files(folder, IMAGE)


def list_files(folder: Path, kind: Kind) -> list[bytes]:
    """List the files of ``kind``, as ``list_images`` does."""
    keys, others = find_files(folder, folder, kind)
    _warn_of_left_out(folder, others, kind)
    return keys


def find_files(folder: Path, root: Path, kind: Kind) -> tuple[list[bytes], Counter[str]]:
    """List the files of ``kind`` below ``folder`` relative to ``root``, and count those of other endings."""
    _check_root(folder, kind)
    keys, others = [], Counter[str]()
    start = len(os.path.join(os.fsencode(root), b""))
    for entry in _walk(os.fsencode(folder)):
        if kind.holds(entry.name):
            keys.append(entry.path[start:].replace(os.sep.encode(), b"/"))
        else:
            others[printable(os.path.splitext(entry.name)[1].lower()) or "no extension"] += 1
    if not keys:
        raise UserError(
            f"{folder}: no {kind.name} file below it; looked for {' '.join(kind.endings)}, found other "
            f"files: {_count_endings(others) or 'none'}"
        )
    return sorted(keys), others


def _warn_of_left_out(root: Path, others: Counter[str], kind: Kind) -> None:
    doubtful = Counter({ending: count for ending, count in others.items() if ending not in _BESIDE})
    if doubtful:
        log_once(f"{root}: left out: {_count_endings(doubtful)} (endings that are not read); {kind.remedy}")


def _count_endings(others: Counter[str]) -> str:
    return shorten([f"{count} x {ending}" for ending, count in others.most_common()])


@cache
def log_once(text: str) -> None:
    """Log a warning once per process, and on several ranks only on rank 0."""
    if is_first_task():
        log.warning("%s", text)


def _walk(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    """Yield visible files and dangling links below ``folder``; enter each real folder once."""
    pending, entered = [folder], set()
    while pending:
        identity, entries = _scan(pending.pop())
        if identity in entered:
            continue
        entered.add(identity)
        kinds = [(entry, _kind(entry)) for entry in entries]
        yield from (entry for entry, kind in kinds if kind == "file")
        pending += [entry.path for entry, kind in reversed(kinds) if kind == "folder"]


def _kind(entry: os.DirEntry[bytes]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        # A dangling link counts as a file, so that it is reported as unreadable.
        if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            return "file"
    except OSError:  # a link to itself
        return "file"
    return "other"


def _check_root(folder: Path, kind: Kind) -> None:
    if not folder.is_dir():
        what = "is a file, a folder is needed" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; set data.root to where the {kind.name}s are")


def _scan(folder: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """Return the identity (device, inode) of a folder, and its visible entries sorted by name."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        raise UserError(
            f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}); grant access or move it"
        ) from error
    return (status.st_dev, status.st_ino), sorted(visible, key=lambda entry: entry.name)


def _class(key: bytes, depth: int, root: Path, kind: Kind) -> str:
    parts = key.split(b"/")
    if len(parts) < depth + 2:
        other = (
            "data.name=imagefolder needs one folder a class, move the file, or use data.name=images for a "
            "tree without classes"
            if kind is IMAGE
            else "move it into the folder of its class"
        )
        raise UserError(f"data.root={root}: {os.fsdecode(key)} lies in no class folder; {other}")
    return printable(parts[depth])

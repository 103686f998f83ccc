"""Finding image files: any folder tree, or one folder a class with or without a split."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from contrastive.config import UserError
from contrastive.data.images import FileImages, printable

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
HELD_OUT_SHARE = 0.2
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_TEST_FOLDERS = ("val", "test")


def open_tree(root: Path, size: int) -> FileImages:
    """``images``: every image file below ``root``, unlabelled.

    Raises:
        UserError: no such folder, a folder that cannot be listed, no image file.
    """
    return FileImages(root, list_images(root), size)


def open_class_folders(root: Path, size: int) -> tuple[FileImages, FileImages, bool]:
    """``imagefolder``: training part, test part, and whether the test part was held out by hash.

    ``root`` holds class folders, or ``train/`` beside ``val/`` or ``test/`` which hold them (``val`` is
    taken where both exist). Without such a split, images are held out by a hash of their relative path,
    never by class, so that adding files moves no other file from one part to the other.

    Raises:
        UserError: as ``open_tree``; files outside of class folders; a test class unknown to train; a part
            that is empty.
    """
    _check_root(root)
    test = _test_folder(root)
    if test is not None:
        train_keys, test_keys = list_images(root / "train", root), list_images(root / test, root)
        depth = 1
    else:
        depth = int(_only_train(root))
        keys = list_images(root / "train" if depth else root, root)
        test_keys = [key for key in keys if is_held_out(key)]
        train_keys = [key for key in keys if not is_held_out(key)]
    if not train_keys or not test_keys:
        empty = "training" if not train_keys else "test"
        raise UserError(
            f"data.root={root}: all {len(train_keys) + len(test_keys)} images fell into one part "
            f"by the hash of their path, none are left for the {empty} part; add images, or split them into "
            f"train/ and val/"
        )
    # Without a split the classes are those of all images: a rare one may be held out as a whole.
    classes = sorted({_class(key, depth, root) for key in (train_keys if test else train_keys + test_keys)})
    parts = [_labelled(root, part, size, classes, depth) for part in (train_keys, test_keys)]
    return parts[0], parts[1], test is None


def is_held_out(key: bytes) -> bool:
    """Whether an image of an unsplit folder belongs to the held-out part, by its relative path alone."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) < HELD_OUT_SHARE * 2**64


def list_images(folder: Path, root: Path | None = None) -> list[bytes]:
    """Paths of all image files below ``folder``, relative to ``root``, sorted by their bytes.

    Links to folders are followed, but no folder is entered twice, so loops end. Hidden names (a leading
    dot) are left out, and so is what is no file (a pipe would block whoever opens it); a dangling link
    stays in, and is found unreadable.

    Raises:
        UserError: no such folder, a folder that cannot be listed, no image file.
    """
    _check_root(folder)
    keys, others = [], Counter[str]()
    start = len(os.path.join(os.fsencode(root or folder), b""))
    for entry in _walk(os.fsencode(folder)):
        if entry.name.lower().endswith(_ENDINGS):
            keys.append(entry.path[start:].replace(os.sep.encode(), b"/"))
        else:
            others[os.path.splitext(os.fsdecode(entry.name))[1].lower() or "no extension"] += 1
    if not keys:
        found = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(3)) or "none"
        raise UserError(
            f"{folder}: no image file below it; looked for {' '.join(EXTENSIONS)}, found other files: {found}"
        )
    return sorted(keys)


def _walk(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    """Visible files and dangling links below ``folder``, each real folder once."""
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
        # A link to nothing counts as a file, so that it is reported, not overlooked.
        if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            return "file"
    except OSError:  # a link to itself
        return "file"
    return "other"


def _check_root(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, a folder is needed" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; set data.root to where the images are")


def _scan(folder: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """What identifies the folder, and its visible entries by name."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        raise UserError(
            f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}); grant access or move it"
        ) from error
    return (status.st_dev, status.st_ino), sorted(visible, key=lambda entry: entry.name)


def _test_folder(root: Path) -> str | None:
    """Name of the folder beside ``train``; a class may be called train, so one alone is no split."""
    if not (root / "train").is_dir():
        return None
    test = next((name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if test and (root / test).samefile(root / "train"):
        raise UserError(f"data.root={root}: train and {test} are one folder, so nothing would be held out")
    return test


def _only_train(root: Path) -> bool:
    _, entries = _scan(os.fsencode(root))
    return [entry.name for entry in entries if _kind(entry) == "folder"] == [b"train"]


def _class(key: bytes, depth: int, root: Path) -> str:
    parts = key.split(b"/")
    if len(parts) < depth + 2:
        raise UserError(
            f"data.root={root}: {os.fsdecode(key)} lies in no class folder; data.name=imagefolder needs one "
            f"folder a class, move the file, or use data.name=images for a tree without classes"
        )
    return printable(parts[depth])


def _labelled(root: Path, keys: list[bytes], size: int, classes: list[str], depth: int) -> FileImages:
    number = {name: index for index, name in enumerate(classes)}
    names = [_class(key, depth, root) for key in keys]
    unknown = sorted(set(names) - set(number))
    if unknown:
        raise UserError(
            f"data.root={root}: test classes without a training image: {', '.join(unknown[:5])} "
            f"({len(unknown)} of {len(set(names))}); both parts need the same class folders"
        )
    return FileImages(root, keys, size, torch.tensor([number[name] for name in names]), classes)

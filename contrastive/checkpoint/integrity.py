"""Write a checkpoint's manifest.json (size and SHA-256 of each file), and verify files before reading any.

This is not the run's manifest.csv, the list of its images: see contrastive/data/image_list.py.
"""

import hashlib
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from contrastive.config import UserError
from memory_bank.replacing import sync

FORMAT = 2
MANIFEST = "manifest.json"
TRAINER = "trainer.pt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST_LIMIT = 1 << 20  # bytes; a real one has a few hundred, and a malicious one must not fill the memory


class CorruptCheckpoint(UserError):
    """A checkpoint is incomplete, damaged or altered; the message says which file and how."""


def seal(directory: Path, step: int) -> None:
    """Flush all files of ``directory``, then write and flush the manifest."""
    files = {}
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if (
            not _NAME.fullmatch(entry.name)
            or not entry.is_file(follow_symlinks=False)
            or entry.name == MANIFEST
        ):
            raise ValueError(
                f"extra_files wrote {entry.name!r}: only regular files with plain names are allowed"
            )
        path = Path(entry.path)
        sync(path)
        size, digest = _digest(path)
        files[entry.name] = {"bytes": size, "sha256": digest}
    (directory / MANIFEST).write_text(_manifest_text(step, files))
    sync(directory / MANIFEST)
    sync(directory)


def verify(path: Path) -> int:
    """Verify every byte of the checkpoint directory ``path`` against its manifest.

    Returns:
        The optimizer step at which it was saved.

    Raises:
        CorruptCheckpoint: a file is missing, added, altered, a link, or has a name that could leave ``path``.
    """
    manifest = _read_manifest(path)
    files = manifest["files"]
    present = {entry.name for entry in os.scandir(path)} - {MANIFEST}
    if missing := sorted(files.keys() - present):
        raise CorruptCheckpoint(f"{path}: {', '.join(missing)} is missing; use an older checkpoint")
    if added := sorted(present - files.keys()):
        raise CorruptCheckpoint(
            f"{path}: {', '.join(added)} is not in the manifest; remove it if it is yours"
        )
    for name, expected in files.items():
        size, digest = _digest(path / name)
        if size != expected["bytes"]:
            raise CorruptCheckpoint(f"{path / name}: has {size} bytes, the manifest says {expected['bytes']}")
        if digest != expected["sha256"]:
            raise CorruptCheckpoint(
                f"{path / name}: its SHA-256 differs from the manifest's: damaged or altered"
            )
    step: int = manifest["step"]
    return step


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of ``path`` and check its form and its own hash."""
    if not stat.S_ISDIR(_lstat(path).st_mode):
        raise CorruptCheckpoint(f"{path}: not a directory; a checkpoint is a directory with a {MANIFEST}")
    with _open(path / MANIFEST) as file:
        raw = file.read(_MANIFEST_LIMIT + 1)
    try:
        manifest = json.loads(raw)
        # Only the exact bytes that _manifest_text writes are accepted, so a flip in a space is found too.
        altered = raw != _manifest_text(manifest["step"], manifest["files"], manifest["format"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path / MANIFEST}: not readable as a manifest: truncated or altered"
        ) from error
    if altered:
        raise CorruptCheckpoint(f"{path / MANIFEST}: differs from its own SHA-256: damaged or altered")
    if manifest["format"] != FORMAT:
        raise CorruptCheckpoint(
            f"{path}: format {manifest['format']!r}, this version reads {FORMAT}; use the one that wrote it"
        )
    _check_names(path, manifest)
    return dict(manifest)


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    well_formed = type(manifest["step"]) is int and isinstance(manifest["files"], dict)
    if not well_formed or TRAINER not in manifest["files"]:
        raise CorruptCheckpoint(f"{path / MANIFEST}: lists no {TRAINER}")
    for name, expected in manifest["files"].items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise CorruptCheckpoint(
                f"{path / MANIFEST}: file name {name!r} is refused; only plain names are allowed"
            )
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise CorruptCheckpoint(f"{path / MANIFEST}: entry of {name!r} has not just 'bytes' and 'sha256'")


def _manifest_text(step: Any, files: Any, version: Any = FORMAT) -> str:
    body = {"format": version, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _digest(path: Path) -> tuple[int, str]:
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _open(path: Path) -> BufferedReader:
    """Open a regular file for reading; links, devices and unreadable files are refused."""
    if not stat.S_ISREG(_lstat(path).st_mode):
        raise CorruptCheckpoint(f"{path}: not a regular file (links are refused)")
    try:
        return path.open("rb")
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read ({error.strerror})") from error


def _lstat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError as error:
        what = "no manifest: a partial save" if path.name == MANIFEST else "does not exist"
        raise CorruptCheckpoint(f"{path}: {what}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read ({error.strerror})") from error

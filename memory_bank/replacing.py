"""Write files atomically and durably, and check beforehand that they can be written."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends, it is flushed and renamed to ``path``.

    A kill or a power cut leaves the old file or the new one, and several processes may write the same file at
    once. If the block fails, ``path`` stays as it was.

    Raises:
        OSError: from the file system.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    if path.is_dir() and os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, save: Callable[[Any], object]) -> None:
    """Create the folder of ``path`` and atomically replace the file by the output of ``save``.

    Raises:
        OSError: from the file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        save(file)


def write_text(path: Path, text: str) -> None:
    """Atomically replace a file by ``text``.

    Raises:
        OSError: from the file system.
    """
    with replacing(path) as partial:
        partial.write_text(text)


def check_folder(folder: Path) -> None:
    """Make and remove a file in ``folder``, or in the nearest existing folder above it.

    Raises:
        OSError: no file can be made there.
        ValueError: the name is not valid for a file.
    """
    while not _exists(folder):
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True

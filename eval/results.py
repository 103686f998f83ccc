"""Write results atomically, and check beforehand that they can be written."""

import json
from pathlib import Path
from typing import Any

from contrastive.config import UserError
from memory_bank.replacing import check_folder, write_file


def open_results(folder: Path) -> None:
    """Check that results can be written to ``folder`` before anything is computed; do not create it.

    Raises:
        UserError: they cannot be written.
    """
    try:
        check_folder(folder)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a result as JSON; NaN and infinity, which JSON does not have, become null.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return ``value`` with NaN and infinities in it replaced by None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def write_text(path: Path, text: str) -> None:
    """Write a result as text; see ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a result.

    Raises:
        UserError: it cannot be written, e.g. the disk is full or the path is a folder.
    """
    try:
        write_file(path, lambda file: file.write(content))
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{str(path)!r}: results cannot be written there ({reason}); set out=FOLDER to another")

"""List, find, prune and delete the checkpoints of a run."""

import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from contrastive.checkpoint.integrity import CorruptCheckpoint, verify
from contrastive.config import UserError
from memory_bank.replacing import replacing

LAST = "last"

STEP = re.compile(r"step-\d+")
_STALE = re.compile(r"\.step-\d+\.[0-9a-f]{8}\.(partial|removed)|\.last\.\d+\.part")


def step_of(path: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def saved(checkpoints: Path) -> list[Path]:
    """List all checkpoints, oldest first, without verifying them."""
    try:
        entries = list(os.scandir(checkpoints))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{checkpoints}: the folder of checkpoints cannot be read ({error.strerror}); fix its "
            "permissions or its disk, then run again"
        ) from error
    return sorted((Path(entry.path) for entry in entries if STEP.fullmatch(entry.name)), key=step_of)


def latest_valid(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint below ``checkpoints`` that verifies; None without one, or without folder.

    Each newer one that does not verify is skipped, with a warning that gives its name and the reason.
    """
    for path in reversed(saved(checkpoints)):
        try:
            verify(path)
        except CorruptCheckpoint as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
        else:
            return path
    return None


def read_last(checkpoints: Path) -> Path | None:
    """Return the checkpoint that ``last`` names (not verified); None without ``last`` or that directory."""
    try:
        name = (checkpoints / LAST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = checkpoints / name
    return path if STEP.fullmatch(name) and path.is_dir() else None


def set_last(path: Path) -> None:
    """Point ``last`` at ``path``."""
    with replacing(path.parent / LAST) as partial:
        partial.write_text(path.name + "\n")


def prune(path: Path, keep_last: int) -> None:
    """Remove all checkpoints but the ``keep_last`` newest up to and including ``path``.

    Those after ``path`` were left by a run that then resumed from an earlier step.
    """
    checkpoints = saved(path.parent)
    position = checkpoints.index(path) + 1
    keep = {path, read_last(path.parent), *checkpoints[max(0, position - keep_last) : position]}
    for other in checkpoints:
        if other not in keep:
            remove(other)


def delete_after(checkpoints: Path, after: int) -> Path | None:
    """Remove the checkpoints after ``after`` optimizer steps; call it on rank 0 only.

    Returns:
        The newest remaining checkpoint, to which ``last`` now points; None if none remains.
    """
    newest = None
    for path in saved(checkpoints):
        if step_of(path) > after:
            remove(path)
        else:
            newest = path
    if newest is not None:
        set_last(newest)
    else:
        (checkpoints / LAST).unlink(missing_ok=True)
    return newest


def remove_stale(checkpoints: Path) -> None:
    """Remove the hidden directories and files that killed saves left; call it on rank 0 only."""
    if not checkpoints.is_dir():
        return
    for entry in list(os.scandir(checkpoints)):
        if _STALE.fullmatch(entry.name):
            _delete(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a checkpoint: rename it to a hidden name first, so that a kill leaves no visible partial one."""
    removed = hidden(path, "removed")
    os.rename(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hidden(path: Path, kind: str) -> Path:
    """Return a hidden name beside ``path``, which is not a checkpoint's and which `remove_stale` removes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")

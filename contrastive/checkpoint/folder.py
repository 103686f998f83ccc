"""A run's folder of checkpoints: which are in it, which is the newest, which go."""

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
    """The optimizer step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def saved(checkpoints: Path) -> list[Path]:
    """Every checkpoint, oldest first; nothing is verified."""
    try:
        entries = list(os.scandir(checkpoints))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{checkpoints}: the folder of checkpoints cannot be read ({error.strerror}); mend that first"
        ) from error
    return sorted((Path(entry.path) for entry in entries if STEP.fullmatch(entry.name)), key=step_of)


def latest_valid(checkpoints: Path) -> Path | None:
    """The newest checkpoint below ``checkpoints`` that verifies; None if there is none, or no such folder.

    Each newer one that does not verify is skipped with a warning naming it and why.
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
    """The checkpoint that ``last`` names (not verified); None if there is no such pointer or directory."""
    try:
        name = (checkpoints / LAST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = checkpoints / name
    return path if STEP.fullmatch(name) and path.is_dir() else None


def set_last(path: Path) -> None:
    """Let ``last`` name ``path``."""
    with replacing(path.parent / LAST) as partial:
        partial.write_text(path.name + "\n")


def prune(path: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest up to ``path``, and those after it.

    Later ones are the abandoned future of a run that went back to before ``path``.
    """
    checkpoints = saved(path.parent)
    position = checkpoints.index(path) + 1
    keep = {path, read_last(path.parent), *checkpoints[max(0, position - keep_last) : position]}
    for other in checkpoints:
        if other not in keep:
            remove(other)


def delete_after(checkpoints: Path, after: int) -> Path | None:
    """Remove the checkpoints of more than ``after`` optimizer steps; only for the run's one writer.

    Returns:
        The newest that stays, to which ``last`` now points; None if none does.
    """
    kept = None
    for path in saved(checkpoints):
        if step_of(path) > after:
            remove(path)
        else:
            kept = path
    if kept is not None:
        set_last(kept)
    else:
        (checkpoints / LAST).unlink(missing_ok=True)
    return kept


def remove_stale(checkpoints: Path) -> None:
    """Remove the hidden directories and files that killed saves left; only for the run's one writer."""
    if not checkpoints.is_dir():
        return
    for entry in list(os.scandir(checkpoints)):
        if _STALE.fullmatch(entry.name):
            _delete(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a checkpoint: out of sight in one step, so that a kill leaves no half of it in view."""
    removed = hidden(path, "removed")
    os.rename(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hidden(path: Path, kind: str) -> Path:
    """A name beside ``path`` that no reader takes for a checkpoint and :func:`remove_stale` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")

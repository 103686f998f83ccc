"""Download and open data sets by torchvision."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from contrastive.config import UserError


def fetch(kind: str, root: Path, download: bool, **part: Any) -> Any:
    """Return a torchvision data set, downloaded if necessary, by one process of this machine.

    Args:
        kind: Its class in ``torchvision.datasets``.
        root: Its folder.
        download: Whether to download what is missing.
        part: Which part: ``train=True``, ``split="test"``.

    Raises:
        UserError: missing or damaged, and ``download`` is false or the download failed.
    """
    make = getattr(importlib.import_module("torchvision.datasets"), kind)
    # torchvision prints while it works, and stdout is for results.
    with redirect_stdout(sys.stderr):
        try:
            return make(str(root), **part, download=False)
        except RuntimeError as error:
            if not download:
                raise UserError(
                    f"data.root={root}: not found or damaged, and data.download=false; set "
                    f"data.download=true, or put the unpacked files there"
                ) from error
        try:
            with only_process(root):
                return make(str(root), **part, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.root={root}: download failed ({error}); fetch the files elsewhere and put them there, "
                f"or use data.name=digits, which needs no network"
            ) from error


@contextmanager
def only_process(root: Path) -> Iterator[None]:
    """Lock ``root`` for one process at a time, so that ranks that start together download once."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # not a POSIX system, where several ranks a machine are not supported either
        yield
        return
    with open(root / ".download.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

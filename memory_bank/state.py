"""A miner's state as a file: tensors and plain values only, never pickled code."""

import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from memory_bank.storage import DatasetBank, QueueBank, Storage

_FORCE_PICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CHECKPOINT = re.compile(r"step-\d+")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``Miner.state_dict()`` to ``path``; replaced in one move, flushed to disk before it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote (or a checkpoint's ``bank.pt``), onto the CPU.

    In a checkpoint, the bytes are first compared with the hash in its ``manifest.json``.

    Raises:
        ValueError: missing, damaged, holding anything but tensors and plain values, or no bank's state; or
            the environment asks torch to run code that a file brings along.
    """
    if os.environ.get(_FORCE_PICKLE):
        raise ValueError(f"{_FORCE_PICKLE} is set: it lets a file run code; unset it")
    try:
        _check_hash(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{path}: damaged, or holds more than tensors and plain values: {error}") from error
    bank = state.get("bank") if isinstance(state, dict) else None
    if not isinstance(bank, dict) or not {"kind", "key", "id", "written_at"} <= bank.keys():
        raise ValueError(f"{path}: not the state of a bank; a checkpoint keeps it in bank.pt")
    found: dict[str, Any] = state
    return found


def _check_hash(path: Path) -> None:
    manifest = path.with_name("manifest.json")
    if not manifest.is_file():
        return
    known = json.loads(manifest.read_bytes())["files"][path.name]["sha256"]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != known:
            raise ValueError(f"its SHA-256 differs from the one in {manifest}")


def find_state(path: Path) -> Path:
    """The bank's file: ``path`` itself, that of a checkpoint directory, or of a run's last checkpoint.

    Raises:
        ValueError: none of the three, or a pointer that names no checkpoint beside it.
    """
    if path.is_file():
        return path
    pointer, folder = path / "checkpoints" / "last", path
    if pointer.is_file():
        name = pointer.read_text(errors="replace").strip()
        folder = pointer.parent / name
        inside = (folder / "bank.pt").resolve().is_relative_to(pointer.parent.resolve())
        if not _CHECKPOINT.fullmatch(name) or not inside:
            raise ValueError(
                f"{pointer}: names {name!r:.80}; only a checkpoint beside it is followed, give its directory"
            )
    if (folder / "bank.pt").is_file():
        return folder / "bank.pt"
    raise ValueError(f"{path}: no bank here; give a run directory, a checkpoint directory or a bank.pt")


def open_bank(state: dict[str, Any]) -> Storage:
    """The bank of a saved state, on the CPU.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    saved = state["bank"]
    kinds: dict[str, type[Storage]] = {"dataset": DatasetBank, "queue": QueueBank}
    key = saved["key"]
    if saved["kind"] not in kinds or key.ndim != 2 or saved["id"].shape != key.shape[:1]:
        raise ValueError(
            f"a {saved['kind']!r} bank of keys {tuple(key.shape)} and ids {tuple(saved['id'].shape)}: "
            "dataset or queue, (n, d) and (n,) are needed"
        )
    bank = kinds[saved["kind"]](
        key.shape[0], key.shape[1], dtype=key.dtype, device=torch.device("cpu"), max_age=None
    )
    bank.load_state_dict(saved)
    return bank

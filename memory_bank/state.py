"""Save and load a miner's state as a sealed safetensors file, in which nothing can be executed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_bank import sealed
from memory_bank.storage import DatasetBank, QueueBank, Storage

BANK = "bank.safetensors"
"""Name of the file in a checkpoint directory."""

_CHECKPOINT = re.compile(r"step-\d+")
_PLAIN = "state"  # metadata entry of everything but tensors; a tensor is named by its path, ``bank/key``


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``Miner.state_dict()`` to ``path`` atomically, flushed to disk.

    Raises:
        TypeError: it holds something other than dicts with text keys, tensors and JSON values.
        OSError: from the file system; ``path`` is then unchanged.
    """
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    sealed.write(path, tensors, {_PLAIN: json.dumps(plain, sort_keys=True)})


def read_state(path: Path) -> dict[str, Any]:
    """Read a file of ``save_state``, of a bank or not, onto the CPU.

    Raises:
        ValueError: missing, damaged, or another file.
    """
    try:
        tensors, metadata = sealed.read(path)
        state = json.loads(metadata[_PLAIN])
        for name, tensor in tensors.items():
            *folders, last = name.split("/")
            node = state
            for folder in folders:
                node = node[folder]
            node[last] = tensor
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not the state of a bank: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: damaged, or not the state of a bank")
    return state


def load_state(path: Path) -> dict[str, Any]:
    """Read the state of a miner from a file of ``save_state``, such as a checkpoint's ``bank.safetensors``.

    Raises:
        ValueError: missing, damaged, or no bank's state.
    """
    state = read_state(path)
    bank = state.get("bank")
    if not isinstance(bank, dict) or not {"kind", "key", "id", "written_at"} <= bank.keys():
        raise ValueError(f"{path}: not the state of a bank; a checkpoint keeps it in {BANK}")
    return state


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` without its tensors, which are put into ``tensors`` under their path."""
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str or "/" in name:
                raise TypeError(f"{path}{name!r}: names without '/' are needed")
        inner = {name: _take_tensors(item, f"{path}{name}/", tensors) for name, item in value.items()}
        return {name: item for name, item in inner.items() if not isinstance(value[name], Tensor)}
    if isinstance(value, Tensor):
        tensors[path.removesuffix("/")] = value
        return None
    _check_json(value, path)
    return value


def _check_json(value: Any, path: str) -> None:
    """Raise TypeError for a value that JSON would not return unchanged."""
    if type(value) is list:
        for item in value:
            _check_json(item, path)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(
            f"{path}: a {type(value).__name__}; tensors, numbers, text and lists of them are kept"
        )


def find_state(path: Path) -> Path:
    """Find the bank's file: ``path`` itself, or in a checkpoint directory, or in a run's last checkpoint.

    Raises:
        ValueError: none of the three, or a pointer that names no checkpoint beside it.
    """
    if path.is_file():
        return path
    pointer, folder = path / "checkpoints" / "last", path
    if pointer.is_file():
        name = pointer.read_text(errors="replace").strip()
        folder = pointer.parent / name
        inside = (folder / BANK).resolve().is_relative_to(pointer.parent.resolve())
        if not _CHECKPOINT.fullmatch(name) or not inside:
            raise ValueError(
                f"{pointer}: names {name!r:.80}; only a checkpoint beside it is followed, give its directory"
            )
    if (folder / BANK).is_file():
        return folder / BANK
    raise ValueError(f"{path}: no bank here; give a run directory, a checkpoint directory or a {BANK}")


def open_bank(state: dict[str, Any]) -> Storage:
    """Build the bank of a saved state, on the CPU.

    Raises:
        ValueError: a kind that does not exist, or entries that no bank of that kind has.
    """
    saved = state["bank"]
    kind, key = saved["kind"], saved["key"]
    if kind not in ("dataset", "queue"):
        raise ValueError(f"bank/kind is {kind!r:.80}, dataset or queue is needed")
    if not isinstance(key, Tensor) or key.ndim != 2 or not key.is_floating_point():
        raise ValueError(f"bank/key is {_describe(key)}, floating-point keys (n, d) are needed")
    rows = key.shape[:1]
    shapes = {"id": rows, "written_at": rows, "refused": ()} | ({"head": ()} if kind == "queue" else {})
    for name, shape in shapes.items():
        tensor = saved.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != torch.int64:
            raise ValueError(f"bank/{name} is {_describe(tensor)}, int64 {tuple(shape)} is needed")
    storage: type[Storage] = DatasetBank if kind == "dataset" else QueueBank
    bank = storage(key.shape[0], key.shape[1], dtype=key.dtype, device=torch.device("cpu"), max_age=None)
    bank.load_state_dict(saved)
    return bank


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "missing" if value is None else f"{value!r:.80}"

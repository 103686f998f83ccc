"""Checkpoints of a few numbers, written by the code under test or signed as an attacker would."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO, SaveOptions

FILES = ("trainer.pt", "bank.safetensors", "encoder.safetensors")


def contents(step: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "global_step": step,
        "epoch": 1,
        "state_dict": {"weight": torch.randn(5, 3, generator=generator)},
        "miner": {
            "keys": torch.randn(7, 2, generator=generator).half(),
            "fill": 0.5,
            "lists": [1, "a", None],
        },
    }


def extra(step: int, directory: Path) -> None:
    (directory / "encoder.safetensors").write_bytes(b"weights of step %d" % step)


def save(root: Path, step: int = 3, keep_last: int | None = None) -> Path:
    path = root / f"step-{step}"
    DirectoryCheckpointIO().save_checkpoint(
        contents(step), path, SaveOptions(partial(extra, step), keep_last)
    )
    return path


def seal(path: Path, files: Sequence[str]) -> None:
    """Write a manifest whose hashes are right, as an attacker would; independent of the code under test."""
    entries = {}
    for name in files:
        data = (path / name).read_bytes() if (path / name).is_file() else b""
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(signed({"format": 2, "step": 3, "files": entries}))


def signed(body: dict[str, Any]) -> str:
    """The text of a manifest that says ``body``."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def names(root: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in root.iterdir())

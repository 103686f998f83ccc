"""Read the files of a run."""

import csv
from pathlib import Path

import torch

from memory_bank.sealed import read
from memory_bank.state import load_state


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read(run_dir / "encoder.safetensors")[0]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def bank(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoints = run_dir / "checkpoints"
    saved = load_state(checkpoints / (checkpoints / "last").read_text().strip() / "bank.safetensors")
    return {name: value for name, value in saved["bank"].items() if isinstance(value, torch.Tensor)}


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def metrics(run_dir: Path) -> list[dict[str, str]]:
    return table(run_dir / "metrics.csv")

"""Dry runs."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from contrastive import dry_run
from contrastive.__main__ import main


@pytest.mark.parametrize(
    "override", ["mining.index=garbage", "bank.device=accelerator", "run.root=/dev/null"]
)
def test_a_dry_run_refuses_what_a_run_would(run, override):
    code, _, err = run("--dry-run", "mining.backend=faiss", override)
    assert code == 2
    assert override.partition("=")[0] in err


def test_images_of_12_bits_are_warned_of_before_training(run, folder):
    """Also by a recipe that draws no pictures."""
    for path in folder.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(16 * grey).save(path)
    for white, warnings in (("65535", 1), ("4095", 0)):
        code, _, err = run("--dry-run", f"data.white={white}")
        assert (code, err.count("nearly black")) == (0, warnings), err


def test_a_dry_run_estimates_and_keeps_nothing(run, tmp_path):
    code, result, err = run("--dry-run")
    assert code == 0
    assert result["steps"] > 2
    bank = re.search(r"bank +([\d.]+), index +([\d.]+), look-ups +([\d.]+) a step; bank.placement=rep", err)
    stated = [result[f"{name}_mib"] for name in ("bank", "index", "lookup")]
    assert [float(mib) for mib in bank.groups()] == stated
    assert result["lookup_mib"] == 0
    assert "8 ranks" not in err
    assert result["estimated_seconds"] >= 0
    assert not (tmp_path / "runs").exists()
    assert main(["--dry-rn"]) == 2


def test_a_dry_run_with_a_large_bank_states_the_needs_of_clusters(run, monkeypatch):
    monkeypatch.setattr(dry_run, "LARGE_BANK", 100)
    _, _, err = run("--dry-run")
    assert re.search(r"look-ups +[\d.]+ a step; sharded, 8 ranks", err)


@pytest.mark.parametrize(("most_s", "taken"), [(1000.0, 4), (20.0, 2)])
def test_a_dry_run_estimates_from_the_steps_after_the_first_in_bounded_time(run, monkeypatch, most_s, taken):
    clock = iter([0.0, 50.0, 50.5, 51.0, 60.0])  # of the start and of the end of each step
    monkeypatch.setattr("contrastive.pretrain.STEPS", 4)
    monkeypatch.setattr("contrastive.pretrain.SECONDS", most_s)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    code, result, err = run("--dry-run")
    assert code == 0
    assert result["estimated_seconds"] == 12 * 0.5
    slow = 12 * 4.75 if taken == 4 else 12 * 0.5  # third quartile of 0.5, 0.5 and 9 s
    assert result["estimated_seconds_range"] == [12 * 0.5, slow]
    assert re.findall(r"^step (\d+): (\S+) s$", err, re.MULTILINE)[:2] == [("1", "50.00"), ("2", "0.50")]
    assert f"12 steps take about 0:00:06, 0:00:06 to 0:00:{slow:02.0f} (h:min:s)" in err
    assert f"median and quartiles of {taken - 1} steps" in err

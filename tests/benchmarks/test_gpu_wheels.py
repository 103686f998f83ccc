"""Packages to carry, found in a made-up set of installed ones."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NEEDS = {
    "torch": ["numpy>=1"],
    "numpy": [],
    "ours": ["numpy", "Engine_Room>=2", 'windowed; sys_platform == "nowhere"', 'extra-one; extra == "all"'],
    "engine-room": ["torch", "oil"],
    "oil": ["engine-room"],
}


@pytest.fixture
def wheels(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def requires(name: str) -> list[str]:
        if name not in NEEDS:
            raise metadata.PackageNotFoundError(name)
        return NEEDS[name]

    def distribution(name: str) -> Any:
        requires(name)
        (tmp_path / name).write_bytes(bytes(2**20))
        return SimpleNamespace(version="1.5", files=[name], locate_file=lambda file: tmp_path / file)

    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setattr(metadata, "distribution", distribution)
    return load("gpu_wheels")


def test_what_the_machine_lacks_is_carried_with_what_that_needs(wheels: Any) -> None:
    found = wheels.wheels(["ours"], base=["torch"])
    assert found == [
        ("engine-room", "ours", "1.5", 1.0),
        ("oil", "engine-room", "1.5", 1.0),
        ("ours", "contrastive-pretrain", "1.5", 1.0),
    ]


def test_a_package_that_only_the_machine_has_need_not_be_installed_here(wheels: Any) -> None:
    assert [one.name for one in wheels.wheels(["oil"], base=["torch", "absent"])] == ["engine-room", "oil"]
    with pytest.raises(SystemExit, match="absent is not installed here"):
        wheels.wheels(["absent"], base=["torch"])


def test_the_listing_is_of_what_setup_cfg_needs(load: Any) -> None:
    needed, _, optional = load("gpu_wheels").listing().partition("Only for wandb and rich")
    assert {"kornia", "kornia-rs", "faiss-cpu", "omegaconf", "jaxtyping"} <= {
        line.split()[0] for line in needed.splitlines()[2:-1]
    }
    assert "wandb" not in needed
    assert "torch==" not in optional
    assert "kornia==" in optional

"""Test the lines that a test run prints about its machine."""

import importlib.util
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def versions() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "versions.py"
    spec = importlib.util.spec_from_file_location("versions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CPUINFO = (
    "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx\n\nprocessor\t: 1\nmodel name\t: other\n"
)


def test_it_names_the_processor_its_vector_instructions_and_every_version(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(versions, "CPUINFO", tmp_path / "cpuinfo")
    versions.main()
    out = capsys.readouterr().out
    assert "processor: AMD EPYC, " in out
    assert " cores, avx avx2\n" in out
    for package in ("torch", "torchvision", "pytorch-lightning", "kornia", "faiss-cpu", "wandb", "numpy"):
        assert f"{package} {metadata.version(package)}" in out


def test_it_prints_versions_where_there_is_no_cpuinfo(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "CPUINFO", tmp_path / "missing")
    versions.main()
    assert "versions: Python 3" in capsys.readouterr().out

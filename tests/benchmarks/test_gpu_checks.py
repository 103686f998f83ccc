"""The checks of a GPU, run on a CPU: bfloat16 against float32, and the collectives of one gloo rank."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from contrastive.config import EncoderConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checks(load: Any) -> Any:
    return load("gpu_checks")


# Lightning's advice on loaders and loggers; a user of the benchmark ignores it too.
@pytest.mark.filterwarnings("ignore")
def test_smoke_of_a_recipe_is_equal_in_bfloat16_and_float32(
    checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["gpu_checks.py", "smoke", "digits", "--device", "cpu", "--tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    checks.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"] == len(found["losses"]) == checks.TINY_STEPS
    assert found["finite"]
    assert found["equal"]
    assert found["images_per_s"] > 0
    assert found["peak_memory_mib"] > 0
    assert found["losses"][0] != found["cpu_loss"] == found["float32_loss"]  # bfloat16 was used
    data = checks.make_files(tmp_path / "images", 40, 32)
    steps = ("trainer.max_steps=1", "trainer.accelerator=cpu", "run.seed=1")
    (other,), summary = checks.train(checks.settings("digits", data, tmp_path, *checks.TINY, *steps))
    config = checks.settings("digits", data, tmp_path, "trainer.precision=32-true")
    assert not checks.is_equal(other, found["cpu_loss"], config)  # other weights and images
    assert summary["bank_used"]


def test_a_loss_may_be_off_by_its_precision_over_the_temperature(checks: Any, tmp_path: Path) -> None:
    for precision, near, far in (("32-true", 4e-4, 6e-4), ("bf16-mixed", 0.15, 0.16)):
        config = checks.settings("digits", tmp_path, tmp_path, f"trainer.precision={precision}")
        assert config.objective.temperature == 0.2
        assert checks.is_equal(5.0 + near, 5.0, config)
        assert checks.is_equal(5.0 - near, 5.0, config)
        assert not checks.is_equal(5.0 + far, 5.0, config)


def test_what_one_device_cannot_do_is_replaced(checks: Any) -> None:
    assert checks.one_device(EncoderConfig()) == ["encoder.weights=null"]
    needs = EncoderConfig(batch_norm="shuffle", args={"drop_path_rate": 0.1})
    assert checks.one_device(needs)[1:] == ["encoder.batch_norm=split", "encoder.args.drop_path_rate=0"]


@pytest.mark.parametrize(("recipe", "resident"), [("cifar10", "auto"), ("imagefolder", "false")])
def test_large_images_are_decoded_while_training(
    checks: Any, recipe: str, resident: str, tmp_path: Path
) -> None:
    config = checks.settings(recipe, tmp_path, tmp_path / "runs")
    assert config.data.resident == resident
    assert config.data.root == str(tmp_path)


def test_collectives_of_one_rank_change_nothing(checks: Any, tmp_path: Path) -> None:
    found = checks.nccl(torch.device("cpu"), tmp_path)
    assert found["backend"] == "gloo"
    assert len(found["collectives"]) == 9
    assert set(found["collectives"].values()) == {True}
    assert not dist.is_initialized()


def test_a_collective_that_changes_something_is_noticed(
    checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also shows that the collectives are called: a single process would take none."""

    def reduce(tensor: torch.Tensor, **_: Any) -> None:
        tensor.add_(1)

    monkeypatch.setattr(dist, "all_reduce", reduce)
    found = checks.nccl(torch.device("cpu"), tmp_path)["collectives"]
    wrong = {name for name, right in found.items() if not right}
    assert wrong == {"gather_with_grad", "all_true", "total of host memory"}


ON_CUDA = re.compile(r"cuda|nccl|device\.type [!=]= .cpu|is_pinned|pin_memory|non_blocking", re.IGNORECASE)


def test_every_file_with_code_for_cuda_alone_is_in_the_list_of_what_covers_it() -> None:
    text = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    section = text.partition("## What runs on CUDA alone")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`((?:contrastive|memory_bank|eval)/[\w/]+\.py)`", section))
    packages = (ROOT / name for name in ("contrastive", "memory_bank", "eval"))
    found = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in package.rglob("*.py")
        if ON_CUDA.search(path.read_text())
    }
    assert found == listed

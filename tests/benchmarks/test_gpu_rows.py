"""The lines of the GPU's table: their commands can be run, and what they show is what the commands found."""

import json
from pathlib import Path
from typing import Any

import pytest

from contrastive.__main__ import parse
from contrastive.config import PretrainConfig
from contrastive.config_files import load_config, recipes
from eval import __main__ as eval_main
from eval.protocol import find_protocol

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def rows(load: Any) -> Any:
    return load("gpu_rows")


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_can_be_run(rows: Any, device: str, tiny: bool, tmp_path: Path) -> None:
    made = rows.all_rows(device, tmp_path, tiny)
    names = [row.name for row in made]
    assert len(names) == len(set(names))
    assert all(row.seconds > 0 for row in made)
    trained = 0
    for command in (command for row in made for command in row.commands):
        assert command[0] in ("-m", "-c") or (ROOT / command[0]).is_file()
        if "contrastive" in command:
            recipe, _, overrides = parse(command[command.index("contrastive") + 1 :])
            config = load_config(PretrainConfig, "pretrain", recipe, overrides)
            assert config.logging.wandb.mode == "disabled"
            assert config.run.root == "{work}"
            assert config.trainer["accelerator"] == {"cuda": "gpu", "cpu": "cpu"}[device]
            trained += 1
        if command[:2] == ("-m", "eval"):
            protocol, overrides = eval_main.parse(command[2:])
            probe = load_config(find_protocol(protocol).config, "eval", protocol, overrides)
            assert probe.checkpoint == "{work}/run"
    assert trained == len(rows.MINUTES) + 1


def test_the_order_is_by_value(rows: Any, tmp_path: Path) -> None:
    names = [row.name for row in rows.all_rows("cuda", tmp_path, False)]
    smokes = [f"smoke-{recipe}" for recipe in recipes("pretrain")]
    assert sorted(names[: len(smokes)]) == smokes
    assert names.index("smoke-stl10") < names.index("smoke-imagefolder")  # the quick ones first
    assert names[len(smokes) :] == [
        "cifar10_fast-2min",
        "cifar10_fast-5min",
        "cifar10_fast-15min",
        "step-resnet18",
        "step-resnet50",
        "views",
        "mining-50000",
        "mining-1280000",
        "nccl",
        "ddp",
        "ablate-core",
        "ablate-all",
        "ablate-classes",
        "ablate-falling",
        "ablate-classes-32",
    ]
    (tmp_path / "outfits").mkdir()
    both = {row.name for row in rows.all_rows("cuda", tmp_path, False)}
    assert both - set(names) == {"ablate-instances", "ablate-near-duplicates", "ablate-instances-32"}


def test_without_data_lines_that_are_scored_are_left_out(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    names = {row.name.partition("-")[0] for row in rows.all_rows("cuda", None, False)}
    assert names == {"smoke", "step", "views", "mining", "nccl", "ddp"}
    (tmp_path / ".data" / "cifar-10-batches-py").mkdir(parents=True)
    runs = [row for row in rows.all_rows("cuda", None, False) if row.name == "cifar10_fast-15min"]
    assert not [text for text in runs[0].commands[0] if text.startswith("data.")]  # the recipe's own


def test_runs_and_the_ablation_resume_and_nothing_else_does(rows: Any, tmp_path: Path) -> None:
    resuming = {row.name for row in rows.all_rows("cuda", tmp_path, False) if row.resumes}
    compared = {f"ablate-{name}" for name in ("core", "all", "classes", "falling", "classes-32")}
    assert resuming == {*compared, *(f"cifar10_fast-{n}min" for n in rows.MINUTES)}


def test_smoke(rows: Any) -> None:
    found = {
        "losses": [5.0, 4.0],
        "steps": 2,
        "float32_loss": 5.00099,
        "cpu_loss": 5.001,
        "images_per_s": 900.0,
    }
    good = rows.read_smoke([{**found, "finite": True, "equal": True}])
    assert good == {
        "losses": "finite for 2 steps",
        "first": "5.0000, in float32 5.0010, on the CPU 5.0010: equal",
        "images/s": 900.0,
    }
    bad = rows.read_smoke([{**found, "finite": False, "equal": False}])
    assert bad["losses"] == "NOT FINITE for 2 steps"
    assert bad["first"].endswith("NOT EQUAL")


def test_step(rows: Any) -> None:
    document = kept("step-cpu")
    own = [row for row in document["rows"] if row["network"] == "resnet18 width 64"]
    figures = rows.read_step([{"rows": own}])
    assert figures["images/s"] == next(row["images_per_s"] for row in own if row["arm"] == "ours")
    assert figures["over its networks alone"] == "0.99"
    assert figures["over lightly"] == "1.27"


def test_views(rows: Any) -> None:
    figures = rows.read_augment([kept("augment-cpu")])
    assert figures["32 px, views"] == "29,453/s, 3.3 times Kornia"
    assert "224 px, views, compiled" in figures


def test_mining(rows: Any) -> None:
    document = kept("bench_mining-cpu")
    small = [row for row in document["rows"] if row["rows"] == 50_000]
    figures = rows.read_mining([{"rows": small}])
    assert figures["subsample, in line"] == "+6.4%"
    assert figures["exact, in line"] == "+18.2%"
    assert figures["step without a bank, ms"] == small[0]["step_ms"]
    assert "off" not in figures


def test_nccl(rows: Any) -> None:
    found = {"backend": "nccl", "collectives": {"a": True, "b": True}, "sync_batch_norm_error": 1.26e-6}
    expected = {"nccl": "collectives unchanged", "largest error of SyncBatchNorm": "1.3e-06"}
    assert rows.read_nccl([found]) == expected
    wrong = rows.read_nccl([{"backend": "gloo", "collectives": {"a": True, "b": False}}])
    assert wrong == {"gloo": "WRONG: b"}


def test_trained_runs(rows: Any) -> None:
    probe = {"scores": {"top1": {"encoder": 0.931}}}
    knn = {"scores": {"top1 k=20": {"encoder": 0.9}}}
    figures = rows.read_trained([{"epochs": 12.5, "seconds": 120.0}, probe, knn])
    assert figures == {"linear probe": "93.1%", "kNN": "90.0%", "epochs": 12.5, "minutes": 2.0}
    figures = rows.read_ddp([{"steps": 20, "metrics": {"train/loss": 3.0}}, probe])
    assert figures == {"steps": 20, "loss": 3.0, "linear probe": "93.1%"}


def test_the_ablation_is_shown_once_it_is_confirmed(rows: Any) -> None:
    document = kept("ablate-cpu")
    figures = rows.read_ablation([document])
    assert figures["dcl over all_rows on fresh seeds"].startswith("+0.7 [")
    assert set(figures) - set(document["arms"]) == {"dcl over all_rows on fresh seeds"}
    assert rows.read_ablation([document | {"confirmation": None}]) is None
    assert rows.read_ablation([{}]) is None

import json
from pathlib import Path
from typing import Any

import pytest

from contrastive.config import PretrainConfig
from contrastive.config_files import differences, load_config

ARMS = ("all_rows", "uniform", "band", "band_oracle")


@pytest.fixture
def ablation(load: Any, tmp_path: Path) -> Any:
    """Of four arms and no cell; one class folder of 200 (empty) images is what it counts."""
    place = tmp_path / "data" / "test" / "train" / "cat"
    place.mkdir(parents=True)
    for number in range(200):
        (place / f"{number}.png").touch()
    return load("ablate").Ablation("cpu", ARMS, tmp_path)


def finish(ablation: Any, score: Any) -> list[Any]:
    """Do what is missing, once: cells score what ``score`` says of them."""
    cells = list(ablation.missing())
    for cell in cells:
        value = score(cell)
        result: dict[str, Any] = {
            "arm": cell.arm,
            "temperature": cell.temperature,
            "seed": cell.seed,
            "train_s": 2.0,
            "train_cpu_s": 1.0,
            "scores": None if value is None else {"linear": value, "knn": value, "lowshot": value},
            "mined": {"same_label_rate": 0.2},
            "made_by": {"commit": "c" * 40, "device": "abacus", "cores": 2, "versions": {"torch": "2"}},
        }
        ablation.keep(cell, result)
    return cells


def likes(best: dict[str, float]) -> Any:
    """A cell's score: half a point for the arm's best temperature, and its place in ARMS, and the seed."""
    return lambda cell: 0.3 + 0.01 * ARMS.index(cell.arm) + 0.005 * (cell.temperature == best[cell.arm])


def test_temperatures_first_then_seeds_then_fresh_seeds_of_the_best(ablation: Any) -> None:
    score = likes({"all_rows": 0.1, "uniform": 0.2, "band": 0.2, "band_oracle": 0.1})
    preset = ablation.preset
    tuning = finish(ablation, score)
    assert {(c.arm, c.temperature) for c in tuning} == {(arm, t) for arm in ARMS for t in preset.temperatures}
    assert {c.part for c in tuning} == {"validation"}
    assert {c.seed for c in tuning} == set(preset.tuning_seeds)
    reported = finish(ablation, score)
    assert {(c.arm, c.temperature) for c in reported} == {
        ("all_rows", 0.1),
        ("uniform", 0.2),
        ("band", 0.2),
        ("band_oracle", 0.1),
    }
    assert {c.seed for c in reported} == set(preset.seeds)
    confirmed = finish(ablation, score)
    assert {c.arm for c in confirmed} == {"all_rows", "uniform", "band"}  # an oracle cannot be confirmed
    assert {c.seed for c in confirmed} == set(preset.fresh_seeds)
    assert not list(ablation.missing())
    used = [set(preset.tuning_seeds), set(preset.seeds), set(preset.fresh_seeds)]
    assert len(set.union(*used)) == sum(map(len, used))


def test_finished_cells_are_not_asked_for_again(ablation: Any, load: Any) -> None:
    score = likes(dict.fromkeys(ARMS, 0.1))
    finish(ablation, score)
    wanted = [cell.name for cell in ablation.missing()]
    ablation.keep(next(ablation.missing()), {"scores": {"linear": 0.5, "knn": 0.5, "lowshot": 0.5}})
    again = load("ablate").Ablation("cpu", ARMS, ablation.folder)
    assert [cell.name for cell in again.missing()] == wanted[1:]


def test_a_changed_arm_is_another_cell(ablation: Any) -> None:
    before = ablation.cell("band", 0.1, 0, "test")
    ablation.arms["band"] = (*ablation.arms["band"], "mining.num_hard=7")
    assert ablation.cell("band", 0.1, 0, "test").name != before.name
    assert ablation.cell("uniform", 0.1, 0, "test").name.startswith("uniform-t0.1-s0-test-")


def test_arms_differ_from_each_other_alone(ablation: Any) -> None:
    shared = {arm: ablation.cell(arm, 0.1, 3, "test").overrides for arm in ablation.arms}
    length = len(ablation.preset.settings) + 2
    assert len({overrides[:length] for overrides in shared.values()}) == 1
    assert all(shared[arm][length:] == ablation.arms[arm] for arm in shared)


def test_arms_are_valid_configs_that_differ_in_method_loss_order_bank_and_mining_alone(load: Any) -> None:
    ablate = load("ablate")
    for preset in ablate.PRESETS.values():
        configs = {
            arm: load_config(PretrainConfig, "pretrain", preset.recipe, [*preset.settings, *overrides])
            for arm, overrides in ablate.arms(5000, preset.batch, preset.epochs).items()
        }
        for arm, config in configs.items():
            changed = set(differences(configs["all_rows"], config))
            parts = ("method", "objective.", "data.order", "bank.", "mining.")
            assert all(name.startswith(parts) for name in changed), arm
            assert changed or arm == "all_rows"
            assert not changed & {"objective.symmetric", "objective.temperature"}


def test_an_arm_that_diverged_is_told_and_not_averaged(ablation: Any) -> None:
    good = likes(dict.fromkeys(ARMS, 0.1))

    def score(cell: Any) -> float | None:
        return None if (cell.arm, cell.seed) == ("band", 2) else float(good(cell)) + 0.001 * (cell.seed % 3)

    finish(ablation, score)
    finish(ablation, score)
    document = ablation.document()
    assert document["diverged"] == ["band"]
    assert list(document["arms"]) == ["all_rows", "uniform", "band_oracle"]
    assert {cell.arm for cell in ablation.missing()} == {"all_rows", "uniform"}


def test_a_temperature_that_diverged_is_not_taken(ablation: Any) -> None:
    finish(ablation, lambda cell: None if cell.temperature == 0.1 else 0.2)
    assert {cell.temperature for cell in ablation.missing()} == {0.2}


def test_report_holds_what_was_measured(ablation: Any, load: Any, tmp_path: Path) -> None:
    good = likes(dict.fromkeys(ARMS, 0.1))

    def score(cell: Any) -> float:
        return float(good(cell)) + 0.001 * (cell.seed * (1 + ARMS.index(cell.arm)) % 3)

    for _ in range(3):
        finish(ablation, score)
    load("ablate").report(ablation, tmp_path / "out", with_plot=False)
    document = json.loads((tmp_path / "out" / "ablate-cpu.json").read_text())
    assert document["open"] == [arm for arm in ablation.arms if arm not in ARMS]
    assert document["samples"] == document["steps"] * ablation.preset.batch
    assert document["confirmation"]["winner"] == "band"
    assert [one["device"] for one in document["made_by"]] == ["abacus"]
    text = (tmp_path / "out" / "ablate-cpu.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `band` | 0.1 |"))
    mean = document["arms"]["band"]["scores"]["linear"]["mean"]
    assert f"| {100 * mean:.1f} ± " in row
    assert "on fresh seeds 200, 201, 202, 203, 204" in text


def test_arms_are_named_or_grouped(load: Any) -> None:
    choose = load("ablate").choose_arms
    assert choose("core")[:2] == ["all_rows", "uniform"]
    assert choose("ring,queue") == ["all_rows", "uniform", "ring", "queue"]
    with pytest.raises(Exception, match="rings: allowed are all_rows"):
        choose("rings")

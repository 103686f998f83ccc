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
    return open_ablation(load, tmp_path, "cpu", ARMS)


def open_ablation(load: Any, folder: Path, preset: str, arms: tuple[str, ...]) -> Any:
    place = folder / "data" / "images" / "train" / "cat"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(200):
        (place / f"{number}.png").touch()
    return load("ablate").Ablation(preset, arms, folder, folder / "cells.jsonl")


def missing(ablation: Any) -> list[Any]:
    return [cell for stage in ("seeds", "fresh", "variants") for cell in ablation.missing(stage)]


def finish(ablation: Any, score: Any) -> list[Any]:
    """Do what is missing, once: cells score what ``score`` says of them."""
    cells = missing(ablation)
    for cell in cells:
        keep(ablation, cell, score(cell))
    return cells


def keep(ablation: Any, cell: Any, value: float | None) -> None:
    result: dict[str, Any] = {
        "arm": cell.arm,
        "temperature": cell.temperature,
        "seed": cell.seed,
        "train_s": 2.0,
        "train_cpu_s": 1.0,
        "scores": None if value is None else dict.fromkeys(ablation.titles, value),
        "mined": {"same_label_rate": 0.2},
        "made_by": {"commit": "c" * 40, "device": "abacus", "cores": 2, "versions": {"torch": "2"}},
    }
    ablation.keep(cell, result)


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
    assert not missing(ablation)
    used = [set(preset.tuning_seeds), set(preset.seeds), set(preset.fresh_seeds)]
    assert len(set.union(*used)) == sum(map(len, used))


def test_temperatures_of_long_runs_are_chosen_in_shorter_ones(load: Any, tmp_path: Path) -> None:
    subject = open_ablation(load, tmp_path, "classes", ("all_rows",))
    for part, epochs in (("validation", 5), ("test", 20)):
        assert f"schedule.epochs={epochs}" in subject.cell("all_rows", 0.1, 0, part).overrides


def test_finished_cells_are_not_asked_for_again(ablation: Any, load: Any) -> None:
    score = likes(dict.fromkeys(ARMS, 0.1))
    finish(ablation, score)
    wanted = missing(ablation)
    keep(ablation, wanted[0], 0.5)
    again = open_ablation(load, ablation.folder, "cpu", ARMS)
    assert [cell.name for cell in missing(again)] == [cell.name for cell in wanted[1:]]


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
    presets = load("ablate_presets")
    every, between = presets.PRESETS, presets.between(64, 0.1)
    twins = {f"{name}-gpu" for name in every} - {"instances-gpu"}  # their arms are those of a CPU
    for preset in (preset for name, preset in every.items() if name not in twins):
        settings = [*preset.settings, f"data.global_batch={preset.batch}"]
        configs = {
            arm: load_config(PretrainConfig, "pretrain", preset.recipe, [*settings, *overrides])
            for arm, overrides in preset.arms(5000).items()
            if arm not in between
        }
        for arm, config in configs.items():
            changed = set(differences(configs["all_rows"], config))
            parts = ("method", "objective.", "data.order", "bank.", "mining.")
            shorter = {"schedule.epochs"} if arm == "batch@time" else set()
            assert all(name.startswith(parts) for name in changed - shorter), arm
            assert changed or arm == "all_rows"
            assert not changed & {"objective.symmetric", "objective.temperature"}


def test_arms_between_all_rows_and_the_batch_take_one_thing_away(load: Any) -> None:
    presets = load("ablate_presets")
    arms, between = presets.FRAMES.arms(5000), presets.between(64, presets.FRAMES.prior)
    assert set(between) < set(arms)
    assert set(presets.METHODS) == {arm for arm in between if arm.startswith("batch@")}
    assert arms["all_rows@symmetric"] == (*arms["all_rows"], "objective.symmetric=true")
    assert arms["all_rows@fast"] == (*arms["all_rows@symmetric"], "encoder.momentum=0.9")
    assert [arms[f"batch@{arm}"] for arm in ("keys", "band", "hardest")] == [
        arms[arm] for arm in ("all_rows", "band", "hardest")
    ]


def test_an_arm_that_diverged_is_told_and_not_averaged(ablation: Any) -> None:
    good = likes(dict.fromkeys(ARMS, 0.1))

    def score(cell: Any) -> float | None:
        return None if (cell.arm, cell.seed) == ("band", 2) else float(good(cell)) + 0.001 * (cell.seed % 3)

    finish(ablation, score)
    finish(ablation, score)
    document = ablation.document()
    assert document["diverged"] == ["band"]
    assert list(document["arms"]) == ["all_rows", "uniform", "band_oracle"]
    assert {cell.arm for cell in missing(ablation)} == {"all_rows", "uniform"}


def test_a_temperature_that_diverged_is_not_taken(ablation: Any) -> None:
    finish(ablation, lambda cell: None if cell.temperature == 0.1 else 0.2)
    assert {cell.temperature for cell in missing(ablation)} == {0.2}


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


def test_seeds_of_all_arms_come_before_the_next_seed_and_other_budgets_last(
    load: Any, tmp_path: Path
) -> None:
    ablation = open_ablation(
        load, tmp_path, "instances", ("all_rows", "uniform", "band", "uniform@16", "band@16")
    )
    for cell in list(ablation.missing("seeds")):
        assert cell.part == "validation"
        keep(ablation, cell, 0.5 + 0.1 * (cell.temperature == 0.2))
    first = [(cell.seed, cell.arm) for cell in ablation.missing("seeds")]
    assert first == [(seed, arm) for seed in range(5) for arm in ("all_rows", "uniform", "band")]
    assert not list(ablation.missing("fresh"))
    budgets = list(ablation.missing("variants"))
    assert [(cell.seed, cell.arm) for cell in budgets[:3]] == [
        (0, "uniform@16"),
        (0, "band@16"),
        (1, "uniform@16"),
    ]
    assert {cell.temperature for cell in budgets} == {0.2}  # chosen at the first budget
    assert "mining.num_uniform=16" in budgets[0].overrides


def test_presets_take_turns_within_a_stage(load: Any, tmp_path: Path) -> None:
    several = [open_ablation(load, tmp_path / name, name, ("all_rows",)) for name in ("instances", "classes")]
    order = [(ablation.name, cell.part) for ablation, cell in load("ablate").missing(several)]
    assert order == [("instances", "validation")] * 2 + [("classes", "validation")] * 2
    for ablation in several:
        finish(ablation, lambda _: 0.5)
    order = [(ablation.name, cell.part) for ablation, cell in load("ablate").missing(several)]
    assert order == [("instances", "test")] * 5 + [("classes", "test")] * 5


def test_arms_are_reported_from_their_second_seed_on(ablation: Any) -> None:
    finish(ablation, likes(dict.fromkeys(ARMS, 0.1)))
    for cell in list(ablation.missing("seeds"))[: 2 * len(ARMS) - 1]:
        keep(ablation, cell, 0.3 + 0.01 * cell.seed * len(cell.arm))
    document = ablation.document()
    assert list(document["arms"]) == ["all_rows", "uniform", "band"]  # the last has one seed
    assert document["open"] == list(ablation.arms)
    assert document["differences"]["all_rows"]["linear"]["band"]["seeds"] == [0, 1]
    assert document["confirmation"] is None


def test_arms_are_named_or_grouped(load: Any) -> None:
    choose = load("ablate").choose_arms
    assert choose("core", "cpu")[:2] == ["all_rows", "uniform"]
    assert choose("ring,queue", "cpu") == ["all_rows", "uniform", "ring", "queue"]
    assert choose("all", "instances") is None
    with pytest.raises(SystemExit, match="rings: allowed are all, all_rows"):
        choose("rings", "cpu")


def test_presets_are_named_or_grouped(load: Any) -> None:
    choose = load("ablate").choose_presets
    assert choose("cpu,classes") == ["cpu", "classes"]
    assert choose("regimes-gpu") == [f"{name}-gpu" for name in choose("regimes")]
    assert len(choose("regimes")) == 6
    with pytest.raises(Exception, match="class: allowed are regimes, regimes-gpu, cpu"):
        choose("class")

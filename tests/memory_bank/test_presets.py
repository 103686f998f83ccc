from importlib import resources

import pytest
import torch
import yaml

from memory_bank.config import MiningConfig
from tests.memory_bank.worlds import World, miner, run

FOLDER = resources.files("configs") / "pretrain" / "mining"
PRESETS = sorted(path.name for path in FOLDER.iterdir() if path.name.endswith(".yaml"))


def keys_of(name):
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_vocabulary_is_complete():
    assert PRESETS == [
        "all_rows.yaml",
        "band.yaml",
        "full_bank.yaml",
        "hardest.yaml",
        "mix.yaml",
        "ring.yaml",
        "uniform.yaml",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_known_keys_and_mines(name):
    preset = keys_of(name)
    assert preset.keys() <= vars(MiningConfig()).keys()
    world, subject = World(), miner(**preset)
    found = run(subject, world, 10)[-1]
    weight = torch.cat([found.hard_log_weight, found.shared_log_weight], 1)
    assert (weight > -torch.inf).any(1).all()


def test_hardest_is_the_closest_rows_and_uniform_has_none_of_its_own():
    assert MiningConfig(**keys_of("hardest.yaml")).num_uniform == 0
    world, subject = World(), miner(**keys_of("hardest.yaml") | {"num_hard": 5})
    run(subject, world, 10)
    ids, query, key = world.step(10)
    found = subject.negatives(query, key, ids, 10)
    nearest, _ = subject.nearest(query, ids, 10, 5)
    assert torch.equal(found.hard_ids, nearest)
    assert run(miner(**keys_of("uniform.yaml")), world, 10)[-1].hard_index.shape[1] == 0


def test_mix_is_half_hardest_and_half_uniform():
    preset = keys_of("mix.yaml")
    assert preset["num_hard"] == preset["num_uniform"] > 0
    assert {**preset, "num_uniform": 0} == keys_of("hardest.yaml")


@pytest.mark.parametrize("query", ["fresh", "stored"])
def test_uniform_rows_are_drawn_without_a_search(query, monkeypatch):
    world = World()
    subject = miner(world, **keys_of("uniform.yaml") | {"query": query, "class_prior": 0.5})
    monkeypatch.setattr(subject.retrieval, "search", None)
    found = run(subject, world, 10)[-1]
    assert (found.shared_log_weight == 0).any(1).all()
    assert subject.metrics()["mining/similarity_mean"].isfinite()


def test_uniform_rows_above_a_bound_are_counted_among_those_drawn():
    world = World()
    subject = miner(**keys_of("uniform.yaml") | {"max_similarity": -1.0, "num_uniform": 20})
    found = run(subject, world, 10)[-1]
    assert not (found.shared_log_weight == 0).any()
    dropped = subject.dropped()
    assert dropped.pop("max_similarity") == 1
    assert not any(dropped.values())

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.features import Features, PartFeatures
from memory_bank.config import BankConfig, MiningConfig
from tests import tiny

ROWS, DIM, CLASSES = 60, 8, 3


@pytest.fixture
def cell(load: Any) -> Any:
    return load("ablate_cell")


@pytest.fixture
def world() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of a whole bank, and the class of each row."""
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(ROWS, DIM, generator=generator), dim=1)
    return keys, torch.randint(CLASSES, (ROWS,), generator=generator)


def oracle(cell: Any, keys: torch.Tensor, labels: torch.Tensor, **settings: Any) -> Any:
    """The miner that a run of the oracle arm trains with."""
    mining = MiningConfig(skip_top=0.0, **settings)
    miner = cell.label_oracle(labels)(
        BankConfig(dtype="float32"), mining, rows=ROWS, dim=DIM, seed=0, device=keys.device, upcoming=None
    )
    miner.write(keys, torch.arange(ROWS), 0)
    return miner


def test_the_oracle_mines_the_closest_rows_of_other_classes(cell: Any, world: Any) -> None:
    keys, labels = world
    miner = oracle(cell, keys, labels, num_hard=5, num_uniform=0, band=[0.0, 1e-6])
    ids = torch.tensor([3, 17, 40, 41])
    found = miner.negatives(keys[ids], keys[ids], ids, 1)
    for query, mined in zip(ids.tolist(), found.hard_ids.tolist(), strict=True):
        others = [row for row in range(ROWS) if labels[row] != labels[query]]
        closest = sorted(others, key=lambda row: -float(keys[row] @ keys[query]))[:5]
        assert mined == closest


def test_the_oracle_takes_fractions_of_the_rows_of_other_classes(cell: Any, world: Any) -> None:
    keys, labels = world
    miner = oracle(cell, keys, labels, num_hard=1, num_uniform=0, band=[0.5, 1.0])
    ids = torch.arange(20)
    ranks = []
    for step in range(1, 40):
        found = miner.negatives(keys[ids], keys[ids], ids, step)
        for query, (mined,) in zip(ids.tolist(), found.hard_ids.tolist(), strict=True):
            others = [row for row in range(ROWS) if labels[row] != labels[query]]
            order = sorted(others, key=lambda row: -float(keys[row] @ keys[query]))
            ranks.append(order.index(mined) / len(others))
    assert min(ranks) == pytest.approx(0.5, abs=0.03)
    assert max(ranks) > 0.93


def test_the_oracle_draws_no_uniform_row_of_the_query_class(cell: Any, world: Any) -> None:
    keys, labels = world
    miner = oracle(cell, keys, labels, num_hard=2, num_uniform=ROWS, band=[0.0, 1.0])
    ids = torch.tensor([0, 5, 9])
    found = miner.negatives(keys[ids], keys[ids], ids, 1)
    admitted = found.shared_log_weight > -torch.inf
    for row, query in enumerate(ids.tolist()):
        drawn = set(found.shared_ids[admitted[row]].tolist())
        hard = set(found.hard_ids[row].tolist())
        assert drawn == {other for other in range(ROWS) if labels[other] != labels[query]} - hard


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy squares in three colours, which are the classes: 30 to train on and 10 to score each."""
    root = tmp_path_factory.mktemp("colours")
    for seed, (part, count) in enumerate((("train", 30), ("test", 10))):
        tiny.write_classes(root / part, count, size=(16, 16), seed=seed)
    return root


def small(cell: Any, arm: str, *overrides: str) -> Any:
    settings = (
        "augment=weak",
        "data.image_size=16",
        "data.global_batch=16",
        "encoder.name=resnet10",
        "encoder.width=8",
        "encoder.projector_hidden=16",
        "encoder.projector_dim=16",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "logging.every_n_steps=1",
        "logging.probe_every_epochs=0",
    )
    return cell.Cell(
        arm, 0.2, 0, "test", "digits", (*settings, *overrides), cell.Classes(20, 20, 10), "classes", "cpu"
    )


# Lightning's advice on loaders and loggers; a worker of the benchmark ignores it too.
@pytest.mark.filterwarnings("ignore")
def test_a_cell_gives_the_same_scores_again_and_mines_what_its_arm_says(
    load: Any, cell: Any, colours: Path, tmp_path: Path
) -> None:
    plain = small(cell, "hardest", "mining=hardest", "mining.num_hard=4")
    load("ablate_data").prepare(plain.data, colours, tmp_path / "data")
    first, again = cell.run(plain, tmp_path), cell.run(plain, tmp_path)
    told = cell.run(replace(plain, arm="told", miner="labels", baselines=True), tmp_path)
    assert first["scores"] == again["scores"]
    assert set(first["scores"]) == {"linear", "knn", "lowshot"}
    assert first["mined"]["same_label_rate"] > 1 / 3  # the closest rows are of the same colour
    assert told["mined"]["same_label_rate"] == 0
    assert told["baselines"]["raw_pixels"]["linear"] > 0.9  # the colour is plain to see
    assert not list((tmp_path / "runs").iterdir())


def test_retrieval_ranks_the_right_picture_as_a_plain_loop_does(cell: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    names = torch.tensor([3, 0, 5, 1, 2, 4])  # of the gallery's pictures, in any order
    gallery, noise = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 12))
    labels = torch.arange(12) % 6
    query = gallery[names.argsort()][labels] + noise
    rank, first, sibling = [], [], []
    for row, label in zip(query.tolist(), labels.tolist(), strict=True):
        cosine = {
            name: sum(a * b for a, b in zip(row, picture, strict=True))
            / math.hypot(*row)
            / math.hypot(*picture)
            for name, picture in zip(names.tolist(), gallery.tolist(), strict=True)
        }
        order = sorted(cosine, key=lambda name: -cosine[name])
        rank.append(1 / (1 + order.index(label)))
        first.append(order[0] == label)
        sibling.append(cosine[label] > cosine[label + 1 - 2 * (label % 2)])
    parts = (
        PartFeatures(gallery.float(), names, torch.arange(6)),
        PartFeatures(query.float(), labels, torch.arange(12)),
    )
    found = cell.retrieval(Features(*parts, classes=tuple("abcdef")))
    assert found["map"] == pytest.approx(sum(rank) / 12)
    assert found["r1"] == pytest.approx(sum(first) / 12)
    assert found["sibling"] == pytest.approx(sum(sibling) / 12)
    assert 0.2 < found["r1"] < 0.9


def test_a_network_without_any_difference_scores_nothing(cell: Any) -> None:
    same = PartFeatures(torch.ones(6, 4), torch.arange(6), torch.arange(6))
    found = cell.retrieval(Features(same, same, classes=tuple("abcdef")))
    assert found == {"map": pytest.approx(1 / 6), "r1": 0.0, "sibling": 0.0}


def test_mined_summary_takes_the_second_half(cell: Any) -> None:
    nan = float("nan")
    columns = {"mining/same_label_rate": [nan, 0.9, 0.9, 0.2, 0.4], "mining/age_mean": [nan, nan]}
    found = cell.mined_summary(columns)
    assert found["same_label_rate"] == pytest.approx(0.3)
    assert found["age_mean"] is None
    assert found["effective_negatives"] is None

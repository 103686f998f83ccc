"""Train with your own loss on the mined negatives: passed in, or named in the registry."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from contrastive.config import UserError
from contrastive.data.dataset import open_dataset
from contrastive.methods.moco import Moco
from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Logits
from contrastive.pretrain import pretrain
from contrastive.registry import OBJECTIVES
from memory_bank.config import check_above_zero
from tests import tiny


def hinge(query, key, negatives, *, margin=0.5, **_):
    """Push the closest negative below the key by ``margin`` (the triplet loss with its hardest negative)."""
    logits = Logits.of(query, key, negatives, temperature=1.0)
    closest = (logits.negative + logits.log_weight).amax(1, keepdim=True)
    return logits.over_positives((closest - logits.positive + margin).relu()), logits.diagnostics()


def build(settings: LossSettings, margin: float = 0.5) -> Objective:
    """Build the loss from a config; its further arguments are ``objective.args``."""
    check_above_zero("objective.args.margin", margin)
    return Objective("hinge", partial(hinge, margin=margin))


def run(tmp_path, *overrides, **parts):
    settings = ["trainer.max_steps=20", "data.global_batch=128", "mining.min_fill=0.1", *overrides]
    return pretrain(tiny.run_config(tmp_path, *settings), **parts)


def test_a_loss_handed_over_takes_the_place_of_the_configs(tmp_path):
    code, summary = run(tmp_path, method=lambda parts: Moco(parts, objective=hinge))
    assert code == 0
    assert 0 < summary["metrics"]["train/loss"] < 1


def test_a_loss_in_the_registry_is_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", f"{__name__}:build")
    _, named = run(tmp_path, "run.name=named", "objective.name=hinge")
    _, given = run(tmp_path, "run.name=given", method=lambda parts: Moco(parts, objective=hinge))
    assert named["metrics"]["train/loss"] == given["metrics"]["train/loss"]


def test_it_has_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", f"{__name__}:build")
    named = ("objective.name=hinge", "objective.args={margin: 0.1}")
    _, near = run(tmp_path, "run.name=near", *named)
    _, given = run(tmp_path, "run.name=given", method=lambda parts: Moco(parts, partial(hinge, margin=0.1)))
    assert near["metrics"]["train/loss"] == given["metrics"]["train/loss"]
    with pytest.raises(UserError, match=r"objective\.args was \{'margin': 0\.1\}, is \{'margin': 0\.3\}"):
        run(tmp_path, "run.name=near", "objective.name=hinge", "objective.args.margin=0.3")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("hinge", "{margn: 1}", r"objective\.args\.margn: objective\.name=hinge .*did you mean 'margin'\?"),
        (
            "hinge",
            "{margin: -1.0}",
            r"objective\.name=hinge .*objective\.args\.margin=-1\.0: more than 0 is needed",
        ),
        ("info_nce", "{margin: 1}", r"objective\.args\.margin: objective\.name=info_nce .*it has none"),
        ("hcl", "{beta: 2}", r"objective\.args\.beta: is a setting of its own; use objective\.beta"),
    ],
)
def test_its_settings_are_checked_before_anything_is_written(name, args, message, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", f"{__name__}:build")
    with pytest.raises(UserError, match=message):
        run(tmp_path, "run.name=wrong", f"objective.name={name}", f"objective.args={args}")
    assert not [*tmp_path.iterdir()]


given_labels = []


def build_supervised(settings: LossSettings, labels) -> Objective:
    """Build a loss that keeps away from other classes alone; the argument ``labels`` makes it supervised."""
    given_labels.append(labels)

    def loss(query, key, negatives, ids):
        same = labels[negatives.shared_ids][None] == labels[ids][:, None]
        weight = negatives.shared_log_weight.masked_fill(same, -torch.inf)
        return info_nce(query, key, replace(negatives, shared_log_weight=weight), temperature=0.2)

    return Objective("supervised", loss, lambda ids, step: {"ids": ids})


def test_it_has_labels_if_it_asks_for_them(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "supervised", f"{__name__}:build_supervised")
    supervised = ("objective.name=supervised", "mining=all_rows")
    assert run(tmp_path, "run.name=a", *supervised)[0] == 0
    assert torch.equal(given_labels.pop(), open_dataset(tiny.config().data).train.labels)
    tiny.write_images(tmp_path / "unlabelled", 130)
    with pytest.raises(UserError, match=r"objective\.name=supervised needs labels, and there are none"):
        run(tmp_path, "run.name=c", *supervised, "data.name=images", f"data.root={tmp_path / 'unlabelled'}")


def test_the_hinge_is_zero_once_the_margin_is_kept():
    negatives = tiny.module("mining=all_rows").method.miner
    query = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    ids = torch.arange(4)
    given = negatives.negatives(query, query, ids, 1)
    loss, _ = hinge(query, query, given, margin=-2.0)
    assert loss == 0

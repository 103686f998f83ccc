"""Train with your own loss on the mined negatives: passed in, or named in the registry."""

import torch

from contrastive.methods.moco import Moco
from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.logits import Logits
from contrastive.pretrain import pretrain
from contrastive.registry import OBJECTIVES
from tests import tiny


def hinge(query, key, negatives, *, margin=0.5, **_):
    """Push the closest negative below the key by ``margin`` (the triplet loss with its hardest negative)."""
    logits = Logits.of(query, key, negatives, temperature=1.0)
    closest = (logits.negative + logits.log_weight).amax(1, keepdim=True)
    return logits.over_positives((closest - logits.positive + margin).relu()), logits.diagnostics()


def build(settings: LossSettings) -> Objective:
    """Build the loss from a config; the registry names this function."""
    return Objective("hinge", lambda query, key, negatives: hinge(query, key, negatives))


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


def test_the_hinge_is_zero_once_the_margin_is_kept():
    negatives = tiny.module("mining=all_rows").method.miner
    query = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    ids = torch.arange(4)
    given = negatives.negatives(query, query, ids, 1)
    loss, _ = hinge(query, query, given, margin=-2.0)
    assert loss == 0

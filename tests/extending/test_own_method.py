"""Train with your own method: a training step that owns a parameter and a buffer."""

import pytest
import torch
import torch.nn.functional as F
from typing_extensions import override

from contrastive.config import UserError
from contrastive.distributed import gather_rows
from contrastive.methods.method import Method, Outcome, Parts
from contrastive.pretrain import pretrain
from contrastive.registry import METHODS
from tests import tiny
from tests.contrastive.pretrain.runs import bank


class LearnedTemperature(Method):
    """Find each image's second view among those of the batch, at a temperature that is learned too."""

    averages_keys = False  # both views go through the query network
    mines = False  # and the bank only feeds the monitors

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.log_scale = torch.nn.Parameter(torch.tensor(1 / parts.config.objective.temperature).log())
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))

    @override
    def step(self, views, rows, step):
        first, second = (self.networks.embed(view) for view in views[:2])
        logits = self.log_scale.exp() * first @ second.T
        loss = F.cross_entropy(logits, torch.arange(len(first), device=first.device))
        self.images_seen += len(rows.all_ids)
        logged = {"temperature": (-self.log_scale.detach()).exp(), "images_seen": self.images_seen.clone()}
        return Outcome(loss, logged, keys=gather_rows(second, rows.sizes))


def run(tmp_path, *overrides, **parts):
    config = tiny.run_config(tmp_path, "schedule.epochs=3", "data.global_batch=128", *overrides)
    return pretrain(config, **parts)


def test_a_method_handed_over_is_trained_logged_saved_and_resumed(tmp_path):
    code, whole = run(tmp_path, "run.name=whole", method=LearnedTemperature)
    assert code == 0
    assert whole["metrics"]["train/images_seen"] == 128 * whole["steps"]
    assert whole["metrics"]["train/temperature"] != tiny.config().objective.temperature
    assert (bank(tmp_path / "runs/whole")["id"] >= 0).float().mean() > 0.99
    run(tmp_path, "run.name=halves", "trainer.max_steps=11", method=LearnedTemperature)
    code, halves = run(tmp_path, "run.name=halves", method=LearnedTemperature)
    assert (code, halves["steps"]) == (0, whole["steps"])
    encoders = [tmp_path / "runs" / name / "encoder.safetensors" for name in ("whole", "halves")]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()
    for name in ("train/temperature", "train/images_seen"):  # the method's own state was saved too
        assert halves["metrics"][name] == whole["metrics"][name]


def test_a_method_in_the_registry_is_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "learned_temperature", f"{__name__}:LearnedTemperature")
    _, named = run(tmp_path, "run.name=named", "method=learned_temperature", "trainer.max_steps=5")
    _, given = run(tmp_path, "run.name=given", "trainer.max_steps=5", method=LearnedTemperature)
    assert named["metrics"]["train/loss"] == given["metrics"]["train/loss"]


def test_a_resume_with_another_method_is_refused(tmp_path):
    run(tmp_path, "run.name=own", "trainer.max_steps=3", method=LearnedTemperature)
    with pytest.raises(UserError, match=r"pretrain\(method=\) was LearnedTemperature, is None"):
        run(tmp_path, "run.name=own")

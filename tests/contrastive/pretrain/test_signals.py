"""Runs that a signal or a time limit stops."""

import itertools
import signal
from types import SimpleNamespace

import pytest

from contrastive.callbacks import preemption
from contrastive.module import ContrastiveModule
from tests.contrastive.pretrain.runs import metrics, same, weights


@pytest.mark.parametrize(
    "when", ["pretrain.open_dataset", "parts.build_loader"]
)  # outside of Lightning's fit, and within
def test_a_signal_ends_a_dry_run_without_a_promise(run, tmp_path, monkeypatch, when):
    asked = []
    monkeypatch.setattr("contrastive.__main__.requeue", lambda: asked.append("requeue"))
    monkeypatch.setattr(f"contrastive.{when}", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
    code, _, err = run("--dry-run")
    assert (code, err.splitlines()[-1]) == (75, "stopped by SIGUSR1; nothing is kept")
    assert (asked, (tmp_path / "runs").exists()) == ([], False)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("SIGUSR1", "pretrain.open_dataset"),  # outside of Lightning's fit
        ("SIGUSR1", "parts.build_loader"),  # within
        ("SIGTERM", "pretrain.open_dataset"),
        ("SIGINT", "parts.build_loader"),
    ],
)
def test_a_signal_before_the_first_step_ends_the_start_in_order(run, monkeypatch, when, name):
    asked, before = [], signal.getsignal(signal.Signals[name])
    with monkeypatch.context() as patch:
        patch.setattr("contrastive.__main__.requeue", lambda: asked.append("requeue"))
        patch.setattr(f"contrastive.{when}", lambda *_, **__: signal.raise_signal(signal.Signals[name]))
        code, _, err = run()
    assert code == 75
    again = "run the same command again to continue from the last checkpoint, if there is any"
    assert err.splitlines()[-1] == f"stopped by {name}; {again}"
    assert asked == (["requeue"] if name == "SIGUSR1" else [])
    assert signal.getsignal(signal.Signals[name]) == before
    assert run("trainer.max_steps=1")[0] == 0


def test_a_second_ctrl_c_does_not_wait_for_the_step(run, monkeypatch):
    def impatient(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(ContrastiveModule, "training_step", impatient)
    code, _, err = run()
    assert (code, err.splitlines()[-1][:17]) == (75, "stopped by SIGINT")


def test_a_preempted_run_spends_no_time_on_scores(run, tmp_path, monkeypatch):
    step = ContrastiveModule.training_step

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(ContrastiveModule, "training_step", interrupted)
    code, result, _ = run("logging.knn_every_epochs=1", "logging.probe_every_epochs=1")
    assert (code, result["steps"]) == (75, 1)
    scored = [row["step"] for row in metrics(tmp_path / "runs/tiny") if row["knn/top1"] or row["probe/top1"]]
    assert scored == ["0"]  # before the signal


def test_a_time_limit_ends_each_start_with_75_until_the_run_is_done(run, tmp_path, monkeypatch):
    run("run.name=whole")
    clock = itertools.count(0, 50)  # seconds that pass from one look to the next
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    codes = []
    for step in (4, 8, 12):
        code, result, err = run("trainer.max_time=00:00:03:20")
        codes.append((code, result["finished"]))
        assert result["steps"] == step
        told = "stopped by trainer.max_time after saving; run the same command again to continue"
        assert err.count(told) == (code == 75)
    assert codes == [(75, False), (75, False), (0, True)]  # the last step ends the run by itself
    assert same(weights(tmp_path / "runs/whole"), weights(tmp_path / "runs/tiny"))

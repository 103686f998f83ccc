"""Runs with ``schedule.minutes``, on a pretended clock: a step takes a second, all else nothing."""

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest

from contrastive.callbacks import online, time_budget
from contrastive.checkpoint.plain import load
from contrastive.logging import throughput
from contrastive.module import ContrastiveModule
from contrastive.momentum import momentum_at
from contrastive.optim import learning_rate
from tests import tiny
from tests.contrastive.pretrain.runs import bank, metrics, same, weights

HALF = "schedule.minutes=0.5"  # 30 seconds, of which 1% is kept for the end


@pytest.fixture
def clock(monkeypatch):
    """The time; attribute ``step_s`` is what an optimizer step takes, by its number from 0."""
    clock = SimpleNamespace(now=1000.0, step_s=lambda step: 1.0)
    taken = ContrastiveModule.optimizer_step

    def timed(self, *args, **kwargs):
        clock.now += clock.step_s(self.global_step)
        taken(self, *args, **kwargs)

    monkeypatch.setattr(ContrastiveModule, "optimizer_step", timed)
    monkeypatch.setattr(time_budget, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def lengths(err):
    return [int(found) for found in re.findall(r"schedule.minutes=0.5: the run has (\d+) steps", err)]


def test_a_run_ends_with_its_budget_and_its_schedules_end_with_it(run, tmp_path, clock):
    code, result, err = run(HALF, *tiny.MONITORED, "encoder.momentum_end=1", "optimizer.base_lr=0.32")
    assert code == 0
    assert lengths(err) == [29]
    assert "schedule.minutes=0.5: the run has 29 steps, 7.2 epochs (8 images/s at step 5)" in err
    assert (result["steps"], result["finished"], result["epochs"]) == (29, True, 7.25)
    assert (result["budget_minutes"], result["spent_minutes"]) == (0.5, 0.483)
    assert result["planned_steps"] == 29
    rows = [row for row in metrics(tmp_path / "runs/tiny") if row["step"] != "0"]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, 30))
    # One epoch of warm-up, 4 steps, is more than a tenth of the run; until step 5 nobody knows.
    rates = [0.01 * learning_rate(step, total_steps=29, warmup_steps=2) for step in range(29)]
    assert [float(row["train/lr"]) for row in rows[6:]] == pytest.approx(rates[6:], rel=1e-12)
    assert rates[-1] < 5e-5
    assert [float(row["train/lr"]) for row in rows[:3]] == pytest.approx([0.002, 0.004, 0.006])
    assert [float(row["train/momentum"]) for row in rows[5:]] == [
        momentum_at(s, 29, 0.99, 1.0) for s in range(5, 29)
    ]
    assert rows[-1]["knn/top1"]  # the end of the run is scored, drawn and saved
    assert float(rows[-1]["views/distance"]) > 0
    assert (tmp_path / "runs/tiny/checkpoints/last").read_text() == "step-29\n"


def test_a_run_that_used_its_budget_is_finished(run, tmp_path, clock):
    _, first, _ = run(HALF)
    before = (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns
    code, second, err = run(HALF)
    assert (code, second) == (0, first)
    assert "this run is finished" in err
    assert (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns == before
    code, _, err = run("schedule.minutes=1")
    assert code == 2
    assert "schedule.minutes was 0.5, is 1.0" in err


@pytest.mark.parametrize("stop", [3, 12], ids=["before the first estimate", "after it"])
def test_a_resumed_run_has_what_is_left_of_its_budget_and_equals_an_uninterrupted_one(
    run, tmp_path, clock, stop
):
    run(HALF, "run.name=whole")
    code, part, _ = run(HALF, f"trainer.max_steps={stop}")
    assert (code, part["steps"], part["spent_minutes"]) == (0, stop, stop / 60)
    clock.now += 500  # between two starts
    code, result, err = run(HALF)
    assert (code, result["steps"], result["spent_minutes"]) == (0, 29, 0.483)
    told = "29 steps, 7.2 epochs (as planned before; 0.2 min are spent, 0.0 of them on this start)"
    assert (told in err) == (stop == 12)
    if stop == 12:  # else the steps that are not measured come twice
        whole, parts = tmp_path / "runs/whole", tmp_path / "runs/tiny"
        assert same(weights(whole), weights(parts))
        assert same(bank(whole), bank(parts))


def test_what_a_kill_lost_does_not_count(run, tmp_path, clock):
    class Killed(BaseException):
        pass

    def step_s(step):
        if step == 9:
            raise Killed
        return 1.0

    clock.step_s = step_s
    with pytest.raises(Killed):
        run(HALF, "run.checkpoint_every=6")
    saved = load(tmp_path / "runs/tiny/checkpoints/step-6/trainer.pt", "cpu")["callbacks"]["TimeBudget"]
    assert (saved["spent_s"], saved["total_steps"]) == (6, 29)
    clock.step_s = lambda step: 1.0
    code, result, _ = run(HALF, "run.checkpoint_every=6")
    assert (code, result["steps"], result["spent_minutes"]) == (0, 29, 0.483)


def test_a_slower_machine_means_fewer_steps_and_a_faster_one_more(run, tmp_path, clock):
    clock.step_s = lambda step: 1.0 if step < 8 else 3.0
    code, slow, err = run(HALF)
    assert code == 0
    told = lengths(err)
    assert told[0] == 29
    assert len(told) > 1
    assert all(abs(new / old - 1) > 1 / 3 for old, new in pairwise(told))
    assert abs(told[-1] / 16 - 1) <= 1 / 3
    assert "schedule.minutes=0.5: 16 steps, 4.0 epochs; the run took " in err
    assert slow["steps"] == slow["planned_steps"] == 16
    assert slow["spent_minutes"] == pytest.approx(0.5, rel=0.1)
    assert float(metrics(tmp_path / "runs/tiny")[-1]["train/lr"]) < 0.02 * 0.0125
    clock.step_s = lambda step: 1.0 if step < 15 else 0.5
    code, fast, err = run(HALF, "run.name=fast", "data.resident=false", "data.num_workers=2")
    assert code == 0
    assert fast["steps"] > 35  # batches beyond the first end, which were not decoded ahead
    assert fast["spent_minutes"] == pytest.approx(0.5, rel=0.1)


def test_a_first_step_that_leaves_time_for_few_is_said(run, clock):
    clock.step_s = lambda step: 9.0 if step == 0 else 1.0
    _, _, err = run(HALF)
    assert err.count("the first step took 9 s: schedule.minutes=0.5 has time for fewer than 3 more") == 1
    clock.step_s = lambda step: 1.0
    assert "the first step took" not in run(HALF, "run.name=fast")[2]


def test_scores_before_the_first_step_are_none_of_its_time(run, clock, monkeypatch):
    def score(features):
        clock.now += 5
        return 0.5

    monkeypatch.setitem(online._SCORES, "knn", score)
    assert "the first step took" not in run(HALF, "logging.knn_every_epochs=20")[2]


def test_the_length_is_said_again_only_if_it_differs_by_more_than_a_third(run, clock):
    clock.step_s = lambda step: 1.0 if step < 15 else 2.0
    _, result, err = run(HALF)
    assert (lengths(err), result["steps"]) == ([29], 23)


def test_a_frozen_encoder_thaws_after_a_quarter_of_the_budget(run, tmp_path, clock):
    every = ["run.checkpoint_every=1", "run.keep_last=9", "trainer.max_steps=8"]
    code, result, err = run(HALF, "encoder.freeze_epochs=100", *every)
    assert (code, result["steps"], result["planned_steps"]) == (0, 8, 29), err
    saved = [weights(tmp_path / f"runs/tiny/checkpoints/step-{step}") for step in (6, 7, 8)]
    assert same(saved[0], saved[1])
    assert not same(saved[1], saved[2])


def test_the_time_before_the_first_step_counts(run, clock, monkeypatch):
    opened = ContrastiveModule.train_dataloader

    def slow(self):
        clock.now += 12
        return opened(self)

    monkeypatch.setattr(ContrastiveModule, "train_dataloader", slow)
    _, result, err = run(HALF)
    assert (result["steps"], result["spent_minutes"]) == (17, 0.483)
    assert "; the run took 0.483 min, 59% training, 41% preparation" in err


def test_the_final_score_has_the_time_that_the_one_before_the_first_step_took(
    run, tmp_path, clock, monkeypatch
):
    def score(features):
        clock.now += 5
        return 0.5

    monkeypatch.setitem(online._SCORES, "knn", score)
    code, result, _ = run(HALF, "logging.knn_every_epochs=20")
    rows = metrics(tmp_path / "runs/tiny")
    assert [row["step"] for row in rows if row["knn/top1"]] == ["0", "19"]
    assert (code, result["steps"], result["spent_minutes"]) == (0, 19, 0.483)


def test_much_work_beside_training_is_itemized_over_all_starts(run, clock, monkeypatch):
    def score(features):
        clock.now += 4
        return 0.5

    monkeypatch.setitem(online._SCORES, "knn", score)
    scored = [HALF, "logging.knn_every_epochs=20"]
    _, _, err = run(*scored, "trainer.max_steps=10")
    assert re.search(r": 10 steps, 2\.5 epochs; the run took [\d.]+ min\n", err)  # 8 of 30 seconds
    _, result, err = run(*scored)
    assert result["spent_minutes"] == 0.483
    assert "; the run took 0.483 min, 59% training, 41% knn" in err


def test_a_budget_that_was_exceeded_is_itemized(run, clock):
    clock.step_s = lambda step: 1.0 if step < 12 else 9.0
    _, result, err = run(HALF)
    assert result["spent_minutes"] > 0.55
    assert re.search(r"; the run took 0\.[5-9]\d* min, 100% training\n", err)


def test_a_run_that_is_cut_by_max_steps_can_be_continued(run, clock):
    for _ in range(2):
        code, result, _ = run(HALF, "trainer.max_steps=3")
        assert (code, result["steps"], result["planned_steps"], result["finished"]) == (0, 3, None, True)
    assert run(HALF)[1]["steps"] > 20


def test_accumulated_micro_batches_are_one_step_and_the_last_step_has_its_row(run, tmp_path, clock):
    _, result, _ = run(HALF, "trainer.accumulate_grad_batches=2", "logging.every_n_steps=7")
    assert result["steps"] == 29
    rows = [row["step"] for row in metrics(tmp_path / "runs/tiny") if row["train/loss"]]
    assert rows == ["7", "14", "21", "28", "29"]


def test_settings_that_need_a_longer_run_are_named_once_the_length_is_known(run, clock):
    code, _, err = run(HALF, "bank.kind=queue", "bank.capacity=65536", "mining.min_fill=0.5")
    assert code == 0
    known, named = err.index("the run has 29 steps"), err.index("the bank is never mined")
    assert known < named
    assert "the run has 29 steps" in err[named:]
    assert "raise schedule.minutes" in err[named:]
    assert err.count("the bank is never mined") == 1


def test_the_progress_bar_ends_with_the_run(run, clock):
    _, _, err = run(HALF, "logging.progress=true")
    assert "29/29" in err
    assert "/1099511627776" not in err


def test_a_dry_run_says_how_many_steps_fit(run, monkeypatch):
    times = iter([0.0, 50.0, 50.5, 51.0, 60.0])
    monkeypatch.setattr("contrastive.pretrain.STEPS", 4)
    monkeypatch.setattr("contrastive.pretrain.SECONDS", 1000.0)
    monkeypatch.setattr("contrastive.dry_run.time", SimpleNamespace(monotonic=lambda: next(times)))
    code, result, err = run("--dry-run", "schedule.minutes=1")
    assert code == 0
    assert (result["steps"], result["epochs"], result["estimated_seconds"]) == (120, 30, 60)
    assert result["steps_range"] == [12, 120]  # by quartiles of 0.5, 0.5 and 9 s
    assert "schedule.minutes=1 is enough for about 120 steps, 30.0 epochs" in err


@pytest.mark.parametrize("minutes", ["0", "-1", ".inf", ".nan"])
def test_senseless_budgets_are_refused(run, minutes):
    code, _, err = run(f"schedule.minutes={minutes}")
    assert code == 2
    assert "schedule.minutes" in err


def test_a_budget_needs_no_epochs(run, clock):
    code, result, _ = run(HALF, "schedule.epochs=1", "schedule.warmup_epochs=5")
    assert (code, result["steps"]) == (0, 29)

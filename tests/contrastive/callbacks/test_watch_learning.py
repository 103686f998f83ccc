"""Test the warnings of a run that does not learn, and that a healthy run has none."""

import math
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from contrastive.callbacks import watch_learning
from contrastive.callbacks.online import OnlineScores
from contrastive.callbacks.watch_health import WatchHealth
from contrastive.callbacks.watch_learning import (
    EpochLoss,
    WatchLearning,
    below_untrained,
    falling_rank,
    level_with_untrained,
    loss_at_chance,
    rising_loss,
    settled_after,
)
from contrastive.callbacks.watcher import standing_warnings
from contrastive.data.torch_dataset import DatasetImages
from tests import tiny

# Recorded: the digits recipe, epochs 1 to 25, then every fifth (2026-11-29). Negatives came from the batch in
# the first half of epoch 1; warm-up lasted 5 epochs of 160.
DIGITS_LOSS = [5.47, 6.13, 5.78, 5.48, 5.22, 4.98, 4.87, 4.78, 4.77, 4.68, 4.62, 4.48, 4.41, 4.39, 4.36, 4.27]
DIGITS_LOSS += [4.21, 4.13, 4.09, 4.05, 4.04, 3.94, 3.89, 3.88, 3.85, 3.74, 3.58, 3.54, 3.46]
DIGITS_RANK = [54.0, 53.7, 52.0, 49.5, 45.9, 42.7, 39.1, 35.1, 31.9, 29.1, 26.8, 25.1, 23.8, 22.5, 21.5, 20.6]
DIGITS_RANK += [20.0, 19.3, 18.7, 18.5, 18.1, 17.9, 17.7, 17.7, 17.6, 17.6, 17.7, 18.0, 18.3]


def epochs(losses, negatives=576.0, mined=True, first=1):
    return [EpochLoss(first + at, float(loss), float(negatives), mined) for at, loss in enumerate(losses)]


def ever(losses):
    """Return the first warning about any beginning of a history."""
    warnings = (rising_loss(losses[:length]) for length in range(1, len(losses) + 1))
    return next(filter(None, warnings), None)


def test_the_recorded_healthy_run_is_silent():
    assert ever(epochs(DIGITS_LOSS[1:])) is None
    for start in range(len(DIGITS_RANK)):  # wherever a quarter of the run ends
        ranks = list(enumerate(DIGITS_RANK[start:], start + 1))
        assert all(falling_rank(ranks[:length], 64) is None for length in range(1, len(ranks) + 1))


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_rise(spread, seed):
    """Whether the loss falls or has come to rest, and with as few as one step an epoch."""
    noise = np.random.default_rng(seed).normal(scale=spread, size=200)
    at = np.arange(200)
    assert ever(epochs(3 + 3 * np.exp(-at / 20) + noise)) is None
    assert ever(epochs(5 + noise)) is None


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_a_loss_that_rises_is_named_with_its_numbers_and_a_setting(spread):
    noise = np.random.default_rng(0).normal(scale=spread, size=40)
    down = np.linspace(6, 4, 20)
    losses = epochs(np.concatenate([down, 4 + 0.1 * np.arange(1, 21)]) + noise)
    said = ever(losses)
    assert re.match(
        r"the loss rises: 4\.[3-6]\d* in epoch 2[4-6], (3\.9|4)\S* in epoch (19|20|21), against", said
    )
    assert "Lower optimizer.base_lr" in said
    assert rising_loss(losses) is not None  # it still holds


def test_a_rise_of_an_epoch_or_two_is_not_named():
    assert ever(epochs([3.0] * 10 + [4.0] * 2 + [3.0] * 10)) is None
    assert ever(epochs([3.0] * 10 + [4.0] * 3)) is not None


def test_only_epochs_with_the_same_negatives_compare():
    """The bank takes over from the batch, a queue fills, and the epoch of the change is of both."""
    batch = epochs([4.6, 4.2, 3.9, 3.6], negatives=127, mined=False)
    falling = np.linspace(6.2, 5.8, 10)
    bank = epochs([3.7, *falling], first=5)
    assert ever(batch + bank) is None
    as_many = epochs([3.7, *falling], negatives=127, first=5)
    assert ever(batch + as_many) is None
    filling = [EpochLoss(at, math.log(at), 100.0 * at, True) for at in range(1, 31)]
    assert ever(filling) is None
    assert rising_loss(batch + bank + epochs([6.5, 7.0, 7.1], first=16))


def test_only_epochs_with_views_of_one_size_compare():
    small = [EpochLoss(at, 3 - 0.05 * at, 100.0, False, 16) for at in range(1, 21)]
    large = [EpochLoss(at, 3 - 0.02 * at, 100.0, False, 24) for at in range(21, 41)]
    assert ever(small + large) is None
    assert rising_loss(small + large + [EpochLoss(at, 4.0, 100.0, False, 24) for at in (41, 42, 43)])


@pytest.mark.parametrize(
    ("score", "untrained", "rows", "bad"),
    [
        (0.60, 0.80, 400, True),
        (0.75, 0.80, 400, False),  # within two standard errors of the difference, 5.9 points
        (0.74, 0.80, 400, True),  # beyond 5.9
        (0.74, 0.80, 100, False),
        (0.90, 0.80, 400, False),
        (0.0, 0.0, 400, False),
        (math.nan, 0.80, 400, False),
        (0.5, math.nan, 400, False),
        (0.124, 0.213, 90, False),  # 8.9 points, of one accuracy alone 8.6 would be allowed
    ],
)
def test_a_score_below_the_untrained_one(score, untrained, rows, bad):
    said = below_untrained("probe/top1", score, untrained, rows)
    assert (said is not None) == bad
    if bad:
        score_in_words = f"the linear probe on held-out images, probe/top1, has {100 * score:.1f}%, "
        assert said.startswith(f"{score_in_words}the encoder before its first step had 80.0%")
        assert "optimizer.base_lr" in said
        assert "(crop_scale, jitter)" in said
        still = below_untrained("probe/top1", score, untrained, rows, jitter=0.0)
        assert (
            "if brightness or colour tell which two views are of one image, set augment.view_1.jitter"
            in still
        )
        assert "(crop_scale, jitter)" not in still


@pytest.mark.parametrize(("guessing", "silent"), [(0.30, True), (0.29, False)])
def test_an_encoder_that_told_no_classes_apart_loses_nothing(guessing, silent):
    """Of folders that are no classes every score is a guess, and one guess is often below another."""
    said = below_untrained("knn/top1", 0.10, 0.30, 400, guessing=guessing)
    assert (said is None) == silent


@pytest.mark.parametrize(
    ("probe", "knn", "rows", "bad"),
    [
        (0.81, 0.60, 400, True),  # both within one standard error: 2 and 2.4 points
        (0.83, 0.60, 400, False),
        (0.81, 0.63, 400, False),
        (0.83, 0.60, 100, True),
        (0.83, 0.60, 99, False),  # too few to tell
        (0.70, 0.50, 400, True),
        (math.nan, 0.60, 400, False),
    ],
)
def test_scores_level_with_the_untrained_ones(probe, knn, rows, bad):
    untrained = {"probe/top1": 0.80, "knn/top1": 0.60}
    said = level_with_untrained({"knn/top1": knn, "probe/top1": probe, "other": 1.0}, untrained, rows)
    assert (said is not None) == bad
    if bad:
        by_knn = f"kNN on held-out images, knn/top1, {100 * knn:.1f}% (60.0%)"
        assert f"probe/top1, {100 * probe:.1f}% (80.0%); {by_knn}" in said
        assert f"{rows} images" in said
        assert "under another run.name (schedule.minutes" in said
    assert level_with_untrained({"probe/top1": 0.5}, {}, rows) is None
    assert level_with_untrained({"probe/top1": probe}, untrained, rows) is None


def test_a_rank_that_falls_to_a_quarter_and_stays_there():
    ranks = [(40, 20.0), (41, 40.0), (42, 30.0), (43, 9.0), (44, 8.0)]
    assert falling_rank(ranks, 64) is None  # not three epochs yet
    assert falling_rank([*ranks, (45, 12.0)], 64) is None
    said = falling_rank([*ranks, (45, 7.0)], 64)
    assert "7.0 of 64 after epoch 45, 40.0 after epoch 41" in said
    assert "objective.temperature" in said


def test_losses_are_judged_after_warm_up_and_the_moving_band():
    module = tiny.module("schedule.epochs=4", "schedule.warmup_epochs=2", rows=40)
    assert settled_after(module.config, module.plan) == 10
    moving = tiny.config("mining.band_end=[0.0,0.1]", "mining.band_steps=33")
    assert settled_after(moving, module.plan) == 33


@pytest.mark.parametrize(
    ("loss", "negatives", "mined", "bad"),
    [
        (4.836, 126.0, False, True),  # recorded: an EfficientNet from random weights after 312 steps
        (4.75, 126.0, False, True),  # 2% of log(127) are 0.097
        (4.74, 126.0, False, False),
        (5.2, 126.0, False, True),
        (4.836, 126.0, True, False),
        (0.0, 0.0, False, False),
    ],
)
def test_a_loss_at_chance(loss, negatives, mined, bad):
    said = loss_at_chance(EpochLoss(2, loss, negatives, mined))
    assert (said is not None) == bad
    if bad:
        assert said.startswith(f"the loss is at chance: {loss:.3g} in epoch 2, and guessing among 126")
        assert "costs 4.84." in said
        assert "crop_scale" in said


class Trainer(pl.Trainer):
    """A trainer of which the test says how many steps it has taken."""

    global_step = 0


class Watched:
    """A run whose losses, ranks and scores are invented: five steps an epoch, twelve epochs."""

    def __init__(self, monkeypatch, *settings, epochs=12):
        self.alerts = []
        monkeypatch.setattr(
            "contrastive.callbacks.watcher.alert", lambda trainer, title, text: self.alerts.append(title)
        )
        self.module = tiny.module("schedule.warmup_epochs=0", *settings, rows=40, epochs=epochs)
        images = DatasetImages(
            [torch.zeros(3, 16, 16, dtype=torch.uint8)] * 40, 16, labels=torch.arange(40) % 2
        )
        self.health, self.online = WatchHealth(), OnlineScores(images, 1, 1)
        self.watch = WatchLearning(self.health, self.online)
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        self.trainer = Trainer(callbacks=[self.watch], **options)

    def epoch(self, number, loss=1.0, rank=10.0, **scores):
        for step in range(5 * number - 4, 5 * number + 1):
            self.trainer.global_step = step
            self.module.diagnostics = {"loss": torch.tensor(loss)}
            self.watch.on_step(self.trainer, self.module, step)
        self.health.rankme, self.online.scores = rank, {f"{k}/top1": v for k, v in scores.items()}
        self.watch.on_epoch(self.trainer, self.module, number)
        return sorted(self.watch.standing)


def said(caplog):
    return [each.getMessage() for each in caplog.records if each.name == "contrastive.callbacks.watcher"]


def test_each_warning_is_said_once_when_it_begins_and_at_the_end_if_it_still_holds(monkeypatch, caplog):
    run = Watched(monkeypatch)
    run.online.untrained = {"knn/top1": 1.0, "probe/top1": 0.9}
    below = ["below the untrained encoder"]
    for number in (1, 2):  # less than a quarter
        assert run.epoch(number, rank=400.0, probe=0.1) == []
    assert run.epoch(3, rank=40.0, probe=0.1) == below
    assert run.epoch(4, rank=40.0, probe=0.1) == below
    assert run.epoch(5, rank=8.0, probe=1.0, knn=0.1) == []  # the probe counts
    assert run.epoch(6, rank=8.0) == []
    assert run.epoch(7, rank=8.0, loss=2.0) == ["falling rank"]
    assert run.epoch(8, rank=8.0, loss=2.0) == ["falling rank"]
    assert run.epoch(9, rank=30.0, loss=2.0) == ["rising loss"]
    assert run.epoch(10, rank=8.0, loss=2.0, probe=0.1) == ["below the untrained encoder", "rising loss"]
    assert run.alerts == [*below, "falling rank", "rising loss"]  # in the order in which they began
    assert len(said(caplog)) == 3
    assert "falls: 8.0 of 8 after epoch 7, 40.0 after epoch 3" in said(caplog)[1]
    assert standing_warnings(run.trainer) == [*run.watch.standing.values()]
    run.watch.on_train_end(run.trainer, run.module)
    ends = said(caplog)[3:]
    assert [text.partition(": ")[0] for text in ends] == ["at the end of the run"] * 2


@pytest.mark.parametrize(("settings", "warned"), [([], ["rising loss"]), (["augment.first_size=12"], [])])
def test_a_loss_that_rises_where_the_views_grow_is_healthy(monkeypatch, settings, warned):
    run = Watched(monkeypatch, *settings, epochs=20)
    for number in range(1, 11):
        assert run.epoch(number) == []
    assert [run.epoch(number, loss=2.0) for number in range(11, 14)][-1] == warned


@pytest.mark.parametrize(("loss", "warned"), [("info_nce", ["loss at chance"]), ("dcl", [])])
def test_a_loss_that_stays_at_chance_is_named_after_half_of_the_run(monkeypatch, loss, warned):
    """Warn for InfoNCE alone: what guessing costs in other losses is not known."""
    run = Watched(monkeypatch, f"objective.name={loss}")
    monkeypatch.setattr(watch_learning, "_negatives", lambda module, step: (6.0, False))
    assert [run.epoch(number, loss=1.94) for number in range(1, 6)] == [[]] * 5
    assert run.epoch(6, loss=1.94) == warned
    assert run.epoch(7, loss=1.8) == []


def test_a_score_that_stays_level_is_named_after_half_of_the_run(monkeypatch, caplog):
    run = Watched(monkeypatch)
    run.online.untrained = {"knn/top1": 0.9, "probe/top1": 0.9}
    run.online.score_rows = torch.arange(100) % 40
    for number in range(1, 6):
        assert run.epoch(number, knn=0.9, probe=0.9) == []
    assert run.epoch(6, knn=0.9, probe=1.0) == []
    assert run.epoch(7, knn=0.9, probe=0.9) == ["level with the untrained encoder"]
    assert run.epoch(8, knn=0.9, probe=0.9) == ["level with the untrained encoder"]
    assert run.epoch(9, knn=0.9, probe=0.0) == ["below the untrained encoder"]  # which says more
    assert run.epoch(10, knn=1.0, probe=0.9) == []
    assert run.alerts == ["level with the untrained encoder", "below the untrained encoder"]
    assert "probe/top1, 90.0% (90.0%)" in said(caplog)[0]


def test_a_warning_that_begins_with_the_last_step_is_said_once(monkeypatch, caplog):
    run = Watched(monkeypatch)
    run.online.untrained = {"probe/top1": 0.9}
    run.online.score_rows = torch.arange(100) % 40
    assert run.epoch(11, probe=1.0, knn=1.0) == []
    assert run.epoch(12, probe=0.9, knn=0.9) == ["level with the untrained encoder"]
    run.watch.on_train_end(run.trainer, run.module)
    (once,) = said(caplog)
    assert once.startswith("no score is clearly above (by more than one standard error) that of")
    assert standing_warnings(run.trainer) == [once]


def test_the_share_of_the_largest_class_is_counted_on_the_scored_images(monkeypatch):
    run = Watched(monkeypatch)
    run.online.score_rows = torch.arange(0, 40, 2)  # all of one class
    assert run.online.largest_class == 1
    run.online.untrained = {"probe/top1": 1.0}
    assert run.epoch(3, probe=0.1) == []
    run.online.score_rows = torch.tensor([0, *range(1, 40, 2)])
    assert run.online.largest_class == 20 / 21
    assert run.epoch(4, probe=0.1) == ["below the untrained encoder"]


def test_a_resumed_run_remembers_its_history(monkeypatch):
    first = Watched(monkeypatch)
    first.online.untrained = {"probe/top1": 0.9}
    for number in range(1, 8):
        assert first.epoch(number, loss=1.0 + (number > 6)) == []
    second = Watched(monkeypatch)
    second.watch.load_state_dict(first.watch.state_dict())
    assert second.epoch(8, loss=2.0) == []
    assert second.epoch(9, loss=2.0, probe=0.1) == ["below the untrained encoder", "rising loss"]
    third = Watched(monkeypatch)
    third.watch.load_state_dict(second.watch.state_dict())
    assert third.epoch(10, loss=2.0) == ["rising loss"]
    assert third.alerts == []  # logged before


def test_a_step_without_a_finite_loss_does_not_count(monkeypatch):
    run = Watched(monkeypatch)
    for number in range(1, 11):
        assert run.epoch(number, loss=1.0 if number < 8 else math.nan) == []
    assert run.epoch(11, loss=2.0) == []
    assert run.epoch(12, loss=2.0) == []  # two epochs are no warning, the third was not finite

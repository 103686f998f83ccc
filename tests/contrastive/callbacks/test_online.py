"""Scores during training are those of the offline protocols, and leave training alone."""

import math
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import pytorch_lightning as pl
import torch

from contrastive.augment.views import center_view
from contrastive.callbacks import online
from contrastive.callbacks.online import OnlineScores, knn_top1, probe_top1
from contrastive.data.plan import Plan
from contrastive.data.torch_dataset import DatasetImages
from contrastive.logging.throughput import Clock
from eval import knn, linear_probe
from eval.features import Features, PartFeatures
from tests import tiny


def clusters(train=600, test=300, dim=8):
    """Two parts of four overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, dim, generator=generator)

    def split(count):
        labels = torch.randint(4, (count,), generator=generator)
        rows = centres[labels] + torch.randn(count, dim, generator=generator)
        return PartFeatures(rows, labels, torch.arange(count))

    return Features(split(train), split(test), tuple("abcd"))


def parts_of(train, train_labels, test, test_labels):
    parts = [(train, torch.tensor(train_labels)), (test, torch.tensor(test_labels))]
    splits = [PartFeatures(rows, labels, torch.arange(len(rows))) for rows, labels in parts]
    return Features(*splits, tuple(map(str, range(max(train_labels + test_labels) + 1))))


class HalfTorn(torch.utils.data.Dataset):
    """Random images, every seventh of which cannot be read."""

    def __len__(self):
        return 60

    def __getitem__(self, row):
        if row % 7 == 0:
            raise OSError("torn")
        return torch.randint(
            0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(row)
        )


def test_scores_equal_the_offline_ones_exactly():
    parts = clusters()
    assert knn_top1(parts) == knn.score(parts, knn.KnnEvaluation("x")).lines[0].value
    offline = linear_probe.score(parts, linear_probe.LinearEvaluation("x"))
    assert probe_top1(parts) == offline.lines[0].value


def test_knn_on_fewer_rows_than_neighbours():
    rows = torch.eye(3)
    assert knn_top1(parts_of(rows, [0, 1, 2], rows, [0, 1, 1])) == pytest.approx(2 / 3)


def test_a_probe_of_one_row_a_class_is_nan():
    rows = torch.eye(3)
    assert math.isnan(probe_top1(parts_of(rows, [0, 1, 2], rows, [0, 1, 2])))


@pytest.mark.parametrize("score", [knn_top1, probe_top1])
def test_features_that_are_not_finite_score_nan(score):
    rows, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), [0, 1] * 10
    broken = rows.clone()
    broken[0] = torch.nan
    assert math.isnan(score(parts_of(broken, labels, rows, labels)))
    assert math.isnan(score(parts_of(rows, labels, broken, labels)))


def test_features_are_of_readable_rows_and_leave_training_alone(monkeypatch):
    images = DatasetImages(HalfTorn(), 16, labels=torch.arange(60) % 3, classes=["a", "b", "c"])
    module = tiny.module()
    module.encoder.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    seen, logged = [], []
    monkeypatch.setattr(
        "contrastive.callbacks.online._SCORES", {"knn": lambda parts: seen.append(parts) or 0.5}
    )
    monkeypatch.setattr("contrastive.callbacks.online.log_row", lambda trainer, row: logged.append(row))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    OnlineScores(images, 1, 0, batch_size=16).on_epoch(trainer, module, 1)

    assert logged[0]["knn/top1"] == 0.5
    assert module.encoder.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    rows = [*seen[0].train.rows.tolist(), *seen[0].test.rows.tolist()]
    assert sorted(rows) == [row for row in range(60) if row % 7]
    module.encoder.eval()
    for part in (seen[0].train, seen[0].test):
        assert torch.equal(part.labels, part.rows % 3)
        pixels = torch.stack([images.read(row) for row in part.rows.tolist()])
        with torch.no_grad():
            expected = module.encoder(center_view(pixels, module.config.data))
        torch.testing.assert_close(part.features, expected, rtol=1e-5, atol=1e-6)


def test_images_of_unknown_class_are_neither_fitted_nor_scored(monkeypatch):
    labels = torch.arange(60) % 3
    labels[::4] = -1
    images = DatasetImages([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 60, 16, labels=labels)
    logged = []
    monkeypatch.setattr("contrastive.callbacks.online.log_row", lambda trainer, row: logged.append(row))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    scores = OnlineScores(images, 1, 1)
    scores.on_epoch(trainer, tiny.module(), 1)
    assert sorted([*scores.fit_rows.tolist(), *scores.score_rows.tolist()]) == [r for r in range(60) if r % 4]
    assert {"knn/top1", "probe/top1"} <= logged[0].keys()
    assert scores.largest_class >= 1 / 3


def clock_of(now):
    """Return a stand-in for the module ``time``, by the seconds in a list of one."""

    def sleep(seconds):
        now[0] += seconds

    return SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)


def steps_scored(monkeypatch, epochs, most_share, every=1):
    """Run ``epochs`` of 10 steps and 2 s each, in which a score takes 2 s.

    Returns:
        The steps that were scored, the share of the time that this took, and the steps between two that a
        time budget counts on.
    """
    now, waited, scored = [0.0], [], []

    def score(features):
        now[0] += 2
        scored.append(trainer.global_step)
        return 0.5

    images = DatasetImages([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 20, 16, labels=torch.arange(20) % 2)
    monkeypatch.setattr("contrastive.callbacks.online.time", clock_of(now))
    monkeypatch.setattr("contrastive.callbacks.online._SCORES", {"knn": score})
    monkeypatch.setattr("contrastive.callbacks.online.log_row", lambda trainer, row: None)
    trainer, module = create_autospec(pl.Trainer, instance=True), tiny.module(epochs=2 * epochs)
    clock = create_autospec(Clock, instance=True)
    clock.leave_out.side_effect = lambda work, every, seconds: waited.append(every)
    trainer.global_step, trainer.is_global_zero, trainer.callbacks = 0, True, [clock]
    scores = OnlineScores(images, every, 0, most_share=most_share)
    scores.on_train_start(trainer, module)
    for epoch in range(1, epochs + 1):
        trainer.global_step, now[0] = epoch * 10, now[0] + 2
        scores.on_epoch(trainer, module, epoch)
    scores.on_train_end(trainer, module)
    return scored, 2 * len(scored) / now[0], waited


def test_scores_take_their_share_of_the_time_with_the_first_and_the_last(monkeypatch):
    """At a share of a quarter, 6 s must lie between two scores, three epochs; the last gap is longer."""
    scored, share, waited = steps_scored(monkeypatch, 13, 0.25)
    assert (scored, share) == ([0, 30, 60, 130], 8 / 34)
    assert waited == [None, 30, 30, 70]
    scored, share, _ = steps_scored(monkeypatch, 100, 0.25)
    assert scored == [*range(0, 931, 30), 1000]
    assert 0.24 < share <= 0.25


def test_a_run_too_short_for_the_share_has_the_first_and_the_last_score(monkeypatch):
    assert steps_scored(monkeypatch, 8, 0.25)[0] == [0, 80]
    assert steps_scored(monkeypatch, 8, 1.0)[0] == [*range(0, 90, 10)]


def test_the_decoding_of_the_images_to_be_scored_counts_once(monkeypatch):
    decode, decoded = OnlineScores._decode, []

    def slow(self, rows):
        online.time.sleep(1)
        decoded.append(len(rows))
        return decode(self, rows)

    monkeypatch.setattr(OnlineScores, "_decode", slow)
    assert steps_scored(monkeypatch, 13, 0.25)[0] == [0, 30, 130]
    assert sum(decoded) == 20


def test_no_score_comes_just_before_the_last(monkeypatch):
    """Every fiftieth epoch is wanted, so that there is time for more; 6 s must lie before the last one."""
    assert steps_scored(monkeypatch, 52, 0.25, every=50)[0] == [0, 520]
    assert steps_scored(monkeypatch, 53, 0.25, every=50)[0] == [0, 500, 530]


def test_scores_wait_for_a_known_end(monkeypatch):
    scores, module = OnlineScores(DatasetImages([0] * 4, 16, labels=[0, 1] * 2), 1, 0, 0.5), tiny.module()
    assert scores._is_affordable(5, module.plan)
    assert not scores._is_affordable(5, Plan(40, 0, 8, None))


def test_scores_before_the_first_step_are_kept_apart_from_later_ones(monkeypatch):
    images = DatasetImages([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 20, 16, labels=torch.arange(20) % 2)
    monkeypatch.setattr("contrastive.callbacks.online._SCORES", {"knn": lambda features: 0.25})
    monkeypatch.setattr("contrastive.callbacks.online.log_row", lambda trainer, row: None)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    scores = OnlineScores(images, 1, 0)
    scores.on_train_start(trainer, tiny.module())
    assert (scores.untrained, scores.scores) == ({"knn/top1": 0.25}, {})

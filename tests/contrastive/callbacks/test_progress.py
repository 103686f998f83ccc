"""Test the lines that a run logs where no progress bar is seen."""

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import pytorch_lightning as pl
import torch

from contrastive.callbacks import build, progress
from contrastive.callbacks.progress import LogProgress
from contrastive.data.dataset import Dataset
from contrastive.data.plan import Plan
from contrastive.data.torch_dataset import DatasetImages
from contrastive.module import ContrastiveModule
from contrastive.run_dir import UnreadableFiles
from tests import tiny


class Trainer(pl.Trainer):
    """A trainer of which the test says how many steps it has taken."""

    global_step = 0


class Training:
    """Steps of seven seconds on a pretended clock; ``steps`` takes some, and returns the lines logged."""

    def __init__(self, monkeypatch, caplog, *, resumed=0, **plan):
        self.now, self.caplog, self.log = 1000.0, caplog, LogProgress()
        caplog.set_level("INFO", progress.__name__)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        self.trainer.global_step = resumed
        self.module = create_autospec(ContrastiveModule, instance=True)
        vars(self.module).update(plan=Plan(80, 0, 8, **plan), diagnostics={"loss": torch.tensor(2.34567)})
        self.log.on_train_start(self.trainer, self.module)

    def work(self, seconds):
        self.now += seconds
        self.log.leave_out("knn", 10, seconds)

    def steps(self, count):
        self.caplog.clear()
        for _ in range(count):
            self.now += 7
            self.trainer.global_step += 1
            self.log.on_train_batch_end(self.trainer, self.module, None, None, 0)
        return [each.getMessage() for each in self.caplog.records if each.name == progress.__name__]


def test_a_line_is_logged_once_a_minute(monkeypatch, caplog):
    run = Training(monkeypatch, caplog, epochs=10)
    assert run.steps(8) == []
    assert run.steps(9) == ["step 9 of 100, loss 2.346, 1 images/s, about 0:10:37 left"]
    assert run.steps(1) == ["step 18 of 100, loss 2.346, 1 images/s, about 0:09:34 left"]


def test_other_work_counts_for_the_time_left_alone(monkeypatch, caplog):
    run = Training(monkeypatch, caplog, epochs=10, resumed=90)
    run.work(53.0)
    assert run.steps(1) == ["step 91 of 100, loss 2.346, 1 images/s, about 0:09:00 left"]


def test_a_run_whose_length_is_not_known_yet_says_how_far_it_is(monkeypatch, caplog):
    run = Training(monkeypatch, caplog, epochs=None)
    assert run.steps(9) == ["step 9, loss 2.346, 1 images/s"]


def test_a_run_that_is_cut_short_ends_there(monkeypatch, caplog):
    run = Training(monkeypatch, caplog, epochs=10)
    run.trainer.fit_loop.epoch_loop.max_steps = 10
    assert run.steps(9) == ["step 9 of 10, loss 2.346, 1 images/s, about 0:00:07 left"]


@pytest.mark.parametrize(("shown", "terminal"), [(True, True), (True, False), (False, True)])
def test_lines_take_the_place_of_a_bar_that_nobody_sees(monkeypatch, tmp_path, shown, terminal):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    images = DatasetImages([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 4, 16)
    config = tiny.config(f"logging.progress={str(shown).lower()}", "logging.mined_rows=0")
    monitors = build.build_monitors(
        config, Dataset(images), tmp_path, UnreadableFiles(tmp_path / "corrupt.csv")
    )
    logs = any(isinstance(each, LogProgress) for each in monitors)
    assert logs == (not (shown and terminal))

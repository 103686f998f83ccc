"""A stopwatch that is never wrong by more than the parts it was told of."""

import logging
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pytest
import pytorch_lightning as pl

from contrastive.callbacks import profile
from contrastive.module import ContrastiveModule


def test_a_part_within_another_interrupts_it(monkeypatch):
    import torch

    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    watch = profile.Stopwatch()
    watch.start("[Strategy]SingleDeviceStrategy.backward")  # idle: not heard
    watch.stop("[Strategy]SingleDeviceStrategy.backward")
    watch.begin(torch.device("cpu"))  # 0
    watch.start("[LightningModule]ContrastiveModule.optimizer_step")  # 1 of other
    watch.start("[Strategy]SingleDeviceStrategy.training_step")  # 2 of optimizer
    with pytest.raises(ZeroDivisionError):
        watch.timed("query", lambda x: x / 0)(1)  # 3 of other, 4 of query
    watch.stop("[Strategy]SingleDeviceStrategy.training_step")  # 5 of other
    watch.start("[Callback]Throughput.on_before_zero_grad")  # of no part
    watch.stop("[Callback]Throughput.on_before_zero_grad")
    watch.stop("[LightningModule]ContrastiveModule.optimizer_step")  # 6 of optimizer
    watch.end()  # 7 of other
    assert {part: spent for part, spent in watch.seconds.items() if spent} == {
        "other": 1 + 3 + 5 + 7,
        "optimizer": 2 + 6,
        "query": 4,
    }
    assert not watch.running


@pytest.mark.parametrize("reads_bank", [True, False])
def test_only_a_method_that_reads_the_bank_waits_for_it(reads_bank, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("contrastive"), "propagate", True)
    module = create_autospec(ContrastiveModule, instance=True)
    config = SimpleNamespace(schedule=SimpleNamespace(minutes=1.0))
    vars(module).update(reads_bank=reads_bank, config=config, miner=MagicMock(ready=lambda: False))
    trainer, steps = create_autospec(pl.Trainer, instance=True), profile.ProfileSteps(skip=3)
    monkeypatch.setattr(steps, "_time_parts", lambda module: None)
    monkeypatch.setattr(steps.watch, "begin", lambda device: steps.watch._parts.append("other"))
    for step in (1, 2):
        steps.on_step(trainer, module, step)
    steps.on_train_end(trainer, module)
    bank = " and until the bank is filled to mining.min_fill" if reads_bank else ""
    assert f"2 steps, and none was measured: that begins after 3 steps{bank}; raise schedule" in caplog.text
    steps.on_step(trainer, module, 3)
    assert steps.watch.running == (not reads_bank)

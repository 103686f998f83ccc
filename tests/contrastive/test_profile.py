"""A stopwatch that is never wrong by more than the parts it was told of."""

import pytest

from contrastive.callbacks import profile


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

"""The networks alone, as the step's benchmark has them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests import tiny


def test_the_limit_takes_steps_of_a_runs_networks_and_optimizer(load: Any, tmp_path: Path) -> None:
    bench = load("bench_step")
    scene = bench.Scene("resnet10", 8, 16, 8, "32-true", 0, 1, 0, 1, 1, (0.0, 0.0))
    limit = bench.Limit(scene, bench.load(scene, tmp_path, tmp_path, "cpu"), torch.device("cpu"))
    before = [weight.clone() for weight in limit.networks.parameters()]
    limit.turn()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, limit.networks.parameters(), strict=True)
    )


def test_steps_with_and_without_local_views_take_turns(load: Any) -> None:
    bench = load("bench_step")
    scene = bench.Scene("resnet10", 8, 16, 8, "32-true", 0, 2, 0, 2, 1, (0.0, 0.0))
    module, turns = tiny.module("augment.local_size=8"), bench.LocalTurns(scene, (0, 3))
    trainer, seen = SimpleNamespace(global_step=0, should_stop=False), []
    turns.on_train_start(trainer, module)
    while not trainer.should_stop:
        turns.on_train_batch_start(trainer, module, None, 0)
        seen.append(len(module.views.chains))
        trainer.global_step += 1
        turns.on_train_batch_end(trainer, module, None, None, 0)
    assert seen == 3 * [2, 2, 5, 5]
    assert [len(spent) for spent in turns.spent.values()] == [2, 2]

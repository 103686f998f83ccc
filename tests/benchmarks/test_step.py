"""The networks alone, as the step's benchmark has them."""

from pathlib import Path
from typing import Any

import torch


def test_the_limit_takes_steps_of_a_runs_networks_and_optimizer(load: Any, tmp_path: Path) -> None:
    bench = load("bench_step")
    scene = bench.Scene("resnet10", 8, 16, 8, "32-true", 0, 1, 0, 1, 1, (0.0, 0.0))
    limit = bench.Limit(scene, bench.load(scene, tmp_path, tmp_path, "cpu"), torch.device("cpu"))
    before = [weight.clone() for weight in limit.networks.parameters()]
    limit.turn()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, limit.networks.parameters(), strict=True)
    )

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memory_bank.config import BankConfig, MiningConfig

ROWS = 400


@pytest.fixture
def keys() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(ROWS, 8, generator=generator), dim=1)


def miner(load: Any, keys: torch.Tensor, rule: str, temperature: float = 0.2) -> Any:
    uniform = 8 if rule == "keep_share" else 0
    mining = MiningConfig(num_hard=8, num_uniform=uniform, band=[0.0, 1.0], backend="exact")
    built = load("ablate_adaptive").build_adaptive(rule, temperature)(
        BankConfig(dtype="float32"), mining, rows=ROWS, dim=8, seed=0, device=keys.device, upcoming=None
    )
    built.write(keys, torch.arange(ROWS), 0)
    return built


def mined(built: Any, keys: torch.Tensor, positive: torch.Tensor, steps: int) -> float:
    """Similarity of the mined rows after some steps, for queries with these positives."""
    ids = torch.arange(16)
    for step in range(1, steps + 1):
        found = built.negatives(keys[ids], positive[ids], ids, step)
    similarity = torch.einsum("bkd,bd->bk", found.hard[found.hard_index], keys[ids])
    return float(similarity.mean())


@pytest.mark.parametrize("rule", ["keep_margin", "follow_positive"])
def test_good_positives_make_the_mined_rows_harder(load: Any, keys: torch.Tensor, rule: str) -> None:
    good = mined(miner(load, keys, rule), keys, keys, 200)
    poor = mined(miner(load, keys, rule), keys, -keys, 200)
    assert poor < 0.4 < 0.7 < good


def test_the_share_of_the_mined_rows_comes_to_its_target(load: Any, keys: torch.Tensor) -> None:
    module = load("ablate_adaptive")
    built = miner(load, keys, "keep_share", temperature=0.5)
    first = mined(built, keys, keys, 1)
    assert mined(built, keys, keys, 200) > first
    found = built.negatives(keys[:16], keys[:16], torch.arange(16), 201)
    hard = torch.einsum("bkd,bd->bk", found.hard[found.hard_index], keys[:16])
    uniform = keys[:16] @ found.shared.T + 0.5 * found.shared_log_weight
    mass = [(part / 0.5).exp().sum(1) for part in (hard, uniform)]
    assert float((mass[0] / (mass[0] + mass[1])).mean()) == pytest.approx(module.SHARE, abs=0.1)

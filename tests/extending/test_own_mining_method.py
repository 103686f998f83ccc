"""Add your own mining method from a program outside of this project."""

import pytest
import torch
from torch.nn.functional import normalize
from typing_extensions import override

from memory_bank.config import BankConfig, MiningConfig
from memory_bank.methods.base import Mined, MiningMethod, distinct, with_hard
from memory_bank.miner import build_miner
from memory_bank.negatives import Negatives
from memory_bank.registry import METHODS

LIMIT = 0.9


class BelowLimit(MiningMethod):
    """Push each query away from its nearest rows, but not from near-duplicates of its image."""

    @override
    def depth(self, config, rows):
        return min(rows, 2 * config.num_hard)  # some of the nearest are left out below

    @override
    def negatives(self, batch, bank, look_up, config):
        nearest = look_up(bank.admissible(batch.step))
        similarity = nearest.similarity.masked_fill(nearest.similarity > LIMIT, -torch.inf)
        similarity, order = similarity.topk(min(config.num_hard, similarity.shape[1]))
        slots = nearest.slots.gather(1, order).masked_fill(similarity == -torch.inf, -1)
        return Mined(with_hard(Negatives.none(batch.query), bank, *distinct(slots)))


def pairs():
    """Return embeddings of 64 images; 2i and 2i + 1 are near-duplicates."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 8, generator=generator).repeat_interleave(2, 0)
    return normalize(images + 0.01 * torch.randn(64, 8, generator=generator), dim=1)


def mined(mining, method=None):
    """Train for two epochs; return the last step's query, ids and negatives, and the logged metrics."""
    embeddings = pairs()
    miner = build_miner(
        BankConfig(), mining, rows=64, dim=8, seed=0, device=torch.device("cpu"), method=method
    )
    for step in range(8):
        ids = torch.arange(16) + 16 * (step % 4)
        query = key = embeddings[ids]
        negatives = miner.negatives(query, key, ids, step)
        miner.write(key, ids, step)
    similarity = torch.einsum("bkd,bd->bk", negatives.hard[negatives.hard_index], query)
    return ids, negatives, similarity, miner.metrics()


def test_a_method_handed_over_serves_the_negatives():
    ids, plain, similarity, _ = mined(MiningConfig(num_hard=4, num_uniform=0))
    assert (similarity > LIMIT).any(1).all()  # without it, each query meets its near-duplicate
    assert (plain.hard_ids == (ids ^ 1)[:, None]).any(1).all()

    ids, negatives, similarity, metrics = mined(MiningConfig(num_hard=4), BelowLimit())
    assert negatives.hard_ids.shape == (16, 4)
    assert (negatives.hard_ids >= 0).all()
    assert not (negatives.hard_ids // 2 == ids[:, None] // 2).any()
    assert (similarity <= LIMIT).all()
    assert metrics["mining/similarity_mean"].item() == pytest.approx(similarity.mean().item())


def test_a_method_in_the_registry_is_chosen_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "below_limit", BelowLimit)
    _, negatives, _, _ = mined(MiningConfig(method="below_limit", num_hard=4))
    _, expected, _, _ = mined(MiningConfig(num_hard=4), BelowLimit())
    assert torch.equal(negatives.hard_ids, expected.hard_ids)
    with pytest.raises(ValueError, match="ranked, all_rows, full_bank, in_batch, below_limit"):
        MiningConfig(method="below")

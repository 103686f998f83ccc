"""Add your own search backend from a program outside of this project."""

import pytest
import torch
from torch.nn.functional import normalize
from typing_extensions import override

from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import build_miner
from memory_bank.registry import BACKENDS
from memory_bank.retrieval.base import Candidates, Retrieval, refine

ROWS, K = 256, 8


class Signs(Retrieval):
    """Find candidates by the signs of the embeddings' dimensions, and score them by the stored keys."""

    approximate = True

    def __init__(self, bank, candidates):
        self.bank, self.candidates = bank, candidates

    @override
    def search(self, query, ids, k, *, admissible, ceiling=None, key=0):
        agreeing = query.sign() @ self.bank.key.float().sign().T
        nearest = agreeing.topk(min(self.candidates, self.bank.capacity)).indices
        slots, similarity = refine(self.bank, query, ids, nearest, admissible, k)
        rows = admissible.sum() - self.bank.num_own(admissible, ids)
        return Candidates(slots, similarity, rows, torch.zeros_like(ids), share=1.0)

    @override
    def describe(self):
        return f"the {self.candidates} rows that agree in most signs"


def build_signs(spec):
    """Look at three times as many rows as are asked for."""
    return spec.spread(Signs(spec.part, 3 * spec.depth))


def mined(backend):
    mining = MiningConfig(backend=backend, num_hard=K, num_uniform=0, band=[0.0, 1 / ROWS])
    miner = build_miner(BankConfig(), mining, rows=ROWS, dim=32, seed=0, device=torch.device("cpu"))
    ids = torch.arange(ROWS)
    keys = normalize(torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    miner.write(keys, ids, 0)
    return miner, miner.negatives(keys[:16], keys[:16], ids[:16], 1)


def test_a_backend_in_the_registry_is_chosen_by_name(monkeypatch):
    monkeypatch.setitem(BACKENDS, "signs", build_signs)
    miner, negatives = mined("signs")
    _, exact = mined("exact")
    assert miner.describe() == f"dataset bank of {ROWS} x 32; the {3 * K} rows that agree in most signs"
    assert negatives.hard_ids.shape == (16, K)
    assert not (negatives.hard_ids == torch.arange(16)[:, None]).any()
    shared = [
        len({*a} & {*b}) for a, b in zip(negatives.hard_ids.tolist(), exact.hard_ids.tolist(), strict=True)
    ]
    assert K / 2 < sum(shared) / 16 < K  # it finds many of the closest rows, by its own means
    with pytest.raises(ValueError, match="auto, exact, faiss, subsample, signs"):
        MiningConfig(backend="sign")

"""On a GPU nothing of a step waits for the device: shown without one, on tensors that have no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrastive.objectives.info_nce import info_nce
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import build_miner

WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select")


class Waits(TorchDispatchMode):
    """Collects what would make the host wait: values it asks for, and copies from one side to the other."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        crosses = len({tensor.device.type for tensor in tensors}) > 1 and "detach" not in str(function)
        if crosses or any(name in str(function) for name in WAITS):
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize(
    ("bank", "mining"),
    [
        ({}, {"backend": "exact"}),
        ({}, {"backend": "subsample", "sample": 256}),
        ({}, {"method": "all_rows"}),
        ({}, {"method": "full_bank"}),
        ({}, {"query": "stored"}),
        ({"max_age": 5}, {"false_negative": "attract", "relative_margin": 0.1}),
        ({"kind": "queue", "capacity": 500}, {}),
    ],
    ids=str,
)
def test_a_step_on_a_gpu_does_not_wait(bank, mining):
    config = MiningConfig(**{"num_hard": 8, "num_uniform": 8, "min_fill": 0.0, **mining})
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        miner = build_miner(
            BankConfig(**bank),
            config,
            rows=1000,
            dim=16,
            seed=0,
            device=device,
            upcoming=lambda step: torch.arange(64, device=device),
        )
        rows, ids = torch.randn(64, 16, device=device), torch.arange(64, device=device)
        with Waits() as waits:
            for step in (1, 2):
                negatives = miner.negatives(rows, rows, ids, step)
                info_nce(rows, rows, negatives, temperature=0.2)
                miner.write(rows, ids, step)
    assert waits.seen == []

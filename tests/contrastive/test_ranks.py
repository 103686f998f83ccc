"""Two ranks with a share of a batch each against one process with all of it: loss, gradients, keys, bank."""

from dataclasses import replace

import pytest
import torch

from contrastive.config import NeighboursConfig
from contrastive.data.batch import Batch
from contrastive.data.order.neighbours import NeighbourOrder
from tests import tiny
from tests.contrastive.ranks import run_ranks

ROWS, BATCH = 40, 8
CASES = {
    "mined": ["mining=band", "mining.num_hard=4", "mining.num_uniform=4"],
    "symmetric": ["mining=band", "mining.num_hard=4", "objective.symmetric=true"],
    "all rows": ["mining=all_rows"],
    "MoCo v3": ["mining.method=in_batch", "objective.symmetric=true", "augment.view_2.noise=0.0"],
    "in the batch": ["mining=band", "mining.min_fill=1.0"],
    "SimCLR": ["method=simclr"],
    "SogCLR": ["method=sogclr", "objective.gamma=0.6"],
    "neighbours": [
        "method=neighbour",
        "objective.name=neighbour_info_nce",
        "mining=band",
        "mining.num_hard=4",
    ],
    "NNCLR": ["method=nnclr", "objective.symmetric=true"],
    "DCLW": ["objective.name=dclw", "mining=band", "mining.num_hard=4"],
    "sharded": ["mining=band", "mining.num_hard=4", "mining.num_uniform=4", "bank.placement=sharded"],
}
SHARES = ((0, 4, 8), (0, 3, 8))
"""Where each rank's images begin and end; they differ in number where some could not be read."""


def step(rank, bounds, overrides):
    """One step of a rank's share: what came out, gradients averaged as DDP does, and the bank after it."""
    import torch.distributed as dist

    module = tiny.module(*overrides, rows=ROWS, fill=False)
    module.eval()  # batch norm stands still: a rank's statistics are not the batch's
    module.miner.write(
        torch.nn.functional.normalize(torch.randn(ROWS - 4, 8), dim=1), torch.arange(ROWS - 4), 0
    )
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8)
    share = slice(bounds[rank], bounds[rank + 1])
    loss = module.training_step(Batch(images[share], torch.arange(BATCH)[share]), 0)
    loss.backward()
    found = {f"gradient of {name}": w.grad for name, w in module.named_parameters() if w.grad is not None}
    found["loss"] = loss.detach()
    for value in found.values() if len(bounds) > 2 else ():
        dist.all_reduce(value)
        value /= len(bounds) - 1
    found |= {f"each row's {name}": getattr(module.method, name) for name in module.method.row_buffers}
    keys, ids = module._unwritten[0]
    module.miner.write(keys, ids, 1)
    bank = module.miner.state_dict()["bank"]
    kept = {name: bank[name] for name in ("key", "id", "written_at") if name in bank}
    return found | {"keys": keys, "ids": ids} | {f"bank {name}": value for name, value in kept.items()}


def composed(rank):
    """The order of the second epoch, from banks that differ between the ranks, as roundings may."""
    module = tiny.module("method=simclr", rows=ROWS, fill=False)
    order = NeighbourOrder(ROWS, 0, NeighboursConfig(group=4, width=5), 0.0)
    module.plan = replace(module.plan, order=order)
    noise = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(rank))
    module.miner.write(torch.nn.functional.normalize(noise, dim=1), torch.arange(ROWS), 0)
    module._compose_epoch(module.plan.steps_per_epoch)
    return {"order": order.ids(1, 0, ROWS)}


def all_cases(rank):
    return {"composed": composed(rank)} | {
        f"{name} {bounds}": step(rank, bounds, overrides)
        for name, overrides in CASES.items()
        for bounds in SHARES
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(all_cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("bounds", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_step_as_one_process_on_the_joined_batch(ranks, name, bounds):
    one = step(0, (0, BATCH), CASES[name])
    gradients = [key for key in one if key.startswith("gradient")]
    assert len(gradients) > 10
    assert max(float(one[key].abs().max()) for key in gradients) > 1e-3
    for number, rank in enumerate(ranks):
        found = rank[f"{name} {bounds}"]
        # A sharded bank is saved by rank 0 alone.
        assert found.keys() | {"bank key", "bank id", "bank written_at"} == one.keys()
        assert (found.keys() == one.keys()) or (name == "sharded" and number == 1)
        for key, value in found.items():
            torch.testing.assert_close(
                value, one[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_all_ranks_visit_an_epoch_in_the_order_that_the_first_composed(ranks):
    expected = composed(0)["order"].tolist()
    assert [rank["composed"]["order"].tolist() for rank in ranks] == [expected] * 2
    assert composed(1)["order"].tolist() != expected


def test_the_bank_is_nothing_that_ddp_would_broadcast():
    """DDP copies rank 0's buffers over the others' before each forward pass: a bank among them is lost."""
    module = tiny.module("data.global_batch=128", rows=300, fill=False)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*module.buffers(), *module.parameters())}
    bank = module.miner.bank.state_dict()
    tensors = [value for value in bank.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 3
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in tensors}

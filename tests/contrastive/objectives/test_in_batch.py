"""Ranks with a share of the batch each, through DDP, against one process with all of it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tests.contrastive.objectives.cases import all_losses, unit
from tests.contrastive.ranks import run_ranks

SIZES = ((4, 4), (3, 5), (1, 7))
LOSSES = ("info_nce", "nt_xent", "nnclr", "dclw")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def step(name, model, rows):
    """Loss and diagnostics of the images ``rows`` of a batch of 8, before the backward pass."""
    from contrastive.objectives.nnclr import attach_neighbour
    from memory_bank.negatives import Negatives

    images = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[rows]
    # One forward of both views: DDP allows no second one before the backward pass.
    query, key = normalize(model(images.transpose(0, 1).reshape(-1, 6)), dim=1).chunk(2)
    key = key if name == "nt_xent" else key.detach()
    shared, ids = unit(5, 4, seed=2), torch.arange(8)[rows]
    negatives = Negatives.none(query.detach())
    if name in ("info_nce", "dclw"):
        negatives = negatives.with_shared(shared, torch.arange(5), query.new_zeros(len(query), 5))
    if name == "nnclr":
        negatives = attach_neighbour(negatives, unit(8, 4, seed=3)[rows], ids)
    return all_losses()[name](query, key, negatives)


def every_share(rank):
    """Loss, DDP's averaged gradients and diagnostics of this rank, for each loss and each share of 8."""
    from contrastive.distributed import mean_weight

    found = {}
    for name in LOSSES:
        for sizes in SIZES:
            wrapped = nn.parallel.DistributedDataParallel(network())
            first = sum(sizes[:rank])
            loss, diagnostics = step(name, wrapped, slice(first, first + sizes[rank]))
            loss = loss * mean_weight(sizes)
            loss.backward()
            found[str((name, sizes))] = {
                "loss": loss.detach(),
                "gradients": [weight.grad for weight in wrapped.parameters()],
                "diagnostics": diagnostics,
            }
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(every_share, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_of_any_size_equal_one_process_on_the_joined_batch(ranks, name, sizes):
    model = network()
    loss, diagnostics = step(name, model, slice(None))
    loss.backward()
    ours = [rank[str((name, sizes))] for rank in ranks]
    torch.testing.assert_close(torch.stack([rank["loss"] for rank in ours]).mean(), loss)
    assert ours[0]["loss"] != ours[1]["loss"]
    for rank in ours:
        for got, weight in zip(rank["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(got, weight.grad, rtol=1e-10, atol=1e-12)
    if sizes[0] == sizes[1]:  # diagnostics are of a rank's own rows, and not weighted
        for key in ("positive_similarity", "accuracy", "negative_similarity"):
            mean = torch.stack([rank["diagnostics"][key] for rank in ours]).mean()
            torch.testing.assert_close(mean, diagnostics[key])

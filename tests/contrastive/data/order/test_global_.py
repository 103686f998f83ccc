import numpy as np
import pytest
import torch

from contrastive.data.order.global_ import GlobalOrder
from tests.reference import plan as reference


def whole(rows, seed, epoch):
    return GlobalOrder(rows, seed).ids(epoch, 0, rows).tolist()


@pytest.mark.parametrize(("rows", "seed", "epoch"), [(1, 0, 0), (7, 3, 1), (1335, 2**32 - 1, 199)])
def test_order_is_philox_sorted(rows, seed, epoch):
    assert whole(rows, seed, epoch) == reference.order(rows, seed, epoch)


def test_order_is_pinned():
    # A resume under another version of any library must find these again.
    assert whole(10, 0, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert whole(10, 1, 1) == [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]


def test_order_differs_between_epochs_and_seeds():
    orders = {tuple(whole(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_order_is_uniform():
    """Each row is at each place equally often: chi-square over 2,000 epochs, 25 degrees of freedom."""
    counts = np.zeros((6, 6))
    for epoch in range(2000):
        counts[whole(6, 0, epoch), np.arange(6)] += 1
    expected = 2000 / 6
    assert ((counts - expected) ** 2 / expected).sum() < 52.6  # p = 0.001


def test_order_ignores_and_leaves_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    first = whole(100, 5, 1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state().clone(), np.random.get_state()[2]
    assert whole(100, 5, 1) == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]


def test_order_may_be_written_to():
    order = GlobalOrder(20, 0)
    kept = order.ids(0, 0, 20).clone()
    order.ids(0, 0, 20).zero_()
    assert torch.equal(order.ids(0, 0, 20), kept)


def test_positions_are_those_of_the_epoch():
    assert GlobalOrder(20, 3).ids(2, 5, 9).tolist() == whole(20, 3, 2)[5:9]


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="epoch=-1"):
        whole(100, 0, -1)

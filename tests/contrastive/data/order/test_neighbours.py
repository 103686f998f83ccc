"""Orders composed from the bank's keys, against ranks found by loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import DataConfig, NeighboursConfig, PretrainConfig
from contrastive.data.arrays import ArrayImages
from contrastive.data.order.global_ import GlobalOrder
from contrastive.data.order.neighbours import NeighbourOrder, build
from memory_bank.config import MiningConfig

ROWS = 60


def keys(seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator), dim=1)


def ranked(vectors, row, known):
    """The other known rows, closest first, by a loop."""
    vectors = vectors.double().numpy()
    others = [other for other in range(len(vectors)) if other != row and known[other]]
    return sorted(others, key=lambda other: -float(vectors[row] @ vectors[other]))


def make(kind="greedy", group=4, width=6, skip=0.0, seed=0, rows=ROWS):
    return NeighbourOrder(rows, seed, NeighboursConfig(kind, group, None, width), skip)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["greedy", "random_walk"]),
    st.integers(1, 70),
    st.integers(2, 9),
    st.integers(1, 30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_every_row_comes_once(kind, rows, group, width, skip, share, seed):
    known = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < share
    ids = make(kind, group, width, skip, seed, rows).compose(1, keys(seed, rows), known)
    assert ids.dtype == torch.int64
    assert ids.sort().values.tolist() == list(range(rows))


@pytest.mark.parametrize("skip", [0.0, 0.1])
def test_greedy_groups_are_of_a_rows_own_neighbourhood_and_never_of_its_closest(skip):
    vectors, known = keys(), torch.ones(ROWS, dtype=torch.bool)
    closest = 6 if skip else 0  # a tenth of 59, rounded up
    near = 0
    for epoch in range(1, 6):
        groups = make(skip=skip).compose(epoch, vectors, known).view(-1, 4).tolist()
        ranks = [[ranked(vectors, first, known).index(row) for row in rest] for first, *rest in groups]
        assert sum(min(group) < closest for group in ranks) <= 1  # the last one takes what is left
        near += sum(closest <= rank < closest + 6 for group in ranks for rank in group)
    # A random row is in a neighbourhood of 6 of 59 a tenth of the time; by the end of an epoch it is used up.
    assert near > 0.4 * 5 * 15 * 3


def test_a_walk_goes_from_neighbour_to_neighbour():
    vectors, known = keys(), torch.ones(ROWS, dtype=torch.bool)
    groups = make("random_walk", skip=0.1).compose(1, vectors, known).view(-1, 4).tolist()
    linked = [
        any(6 <= ranked(vectors, before, known).index(row) < 12 for before in group[:at])
        for group in groups
        for at, row in enumerate(group)
        if at
    ]
    assert sum(linked) > 0.7 * len(linked)


def test_a_walk_as_long_as_the_batch_meets_more_than_one_neighbourhood():
    vectors, known = keys(), torch.ones(ROWS, dtype=torch.bool)
    first, *rest = make("random_walk", group=20, width=4).compose(1, vectors, known)[:20].tolist()
    assert max(ranked(vectors, first, known).index(row) for row in rest) >= 4


@pytest.mark.parametrize("kind", ["greedy", "random_walk"])
def test_an_epoch_depends_on_keys_seed_and_epoch_alone(kind):
    vectors, known = keys(), torch.ones(ROWS, dtype=torch.bool)
    np.random.seed(0)
    torch.manual_seed(0)
    one = make(kind).compose(1, vectors, known)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(make(kind).compose(1, vectors.clone(), known.clone()), one)
    for other in (
        make(kind).compose(2, vectors, known),
        make(kind, seed=1).compose(1, vectors, known),
        make(kind).compose(1, keys(1), known),
    ):
        assert not torch.equal(other, one)


def test_groups_come_in_random_order():
    """The first groups of an epoch find the most neighbours free; they must not all be trained first."""
    vectors, known = keys(rows=600), torch.ones(600, dtype=torch.bool)
    groups = make(rows=600).compose(1, vectors, known).view(-1, 4)
    own = (vectors[groups[:, :1]] @ vectors[groups[:, 1:]].transpose(1, 2)).mean((1, 2))
    halves = own.view(2, 75).mean(1)
    assert (halves[0] - halves[1]).abs() < 0.1
    assert own.std() > 0.1


def test_without_a_key_of_any_row_groups_are_random():
    ids = make().compose(1, torch.zeros(ROWS, 6), torch.zeros(ROWS, dtype=torch.bool))
    assert ids.sort().values.tolist() == list(range(ROWS))
    assert ids.tolist() != list(range(ROWS))


def test_until_an_epoch_is_adopted_it_is_the_global_one_and_the_last_two_are_kept():
    order, plain = make(), GlobalOrder(ROWS, 0)
    for epoch in range(3):
        assert torch.equal(order.ids(epoch, 8, 20), plain.ids(epoch, 8, 20))
    for epoch in (1, 2, 3):
        order.adopt(epoch, torch.arange(ROWS).roll(epoch))
    assert order.ids(3, 0, 5).tolist() == [57, 58, 59, 0, 1]
    assert order.ids(2, 0, 5).tolist() == [58, 59, 0, 1, 2]
    assert order.state_dict().keys() == {"2", "3"}
    order.ids(3, 0, 5).zero_()
    restored = make()
    restored.load_state_dict(order.state_dict())
    assert restored.ids(3, 0, 5).tolist() == [57, 58, 59, 0, 1]
    assert torch.equal(restored.ids(1, 0, 9), plain.ids(1, 0, 9))


def test_the_closest_are_left_out_as_far_as_the_policy_skips_unless_set():
    images = ArrayImages("set", [np.zeros((6, 2, 2, 3), dtype=np.uint8)], 2)

    def skip(neighbours, **mining):
        config = PretrainConfig(data=DataConfig(neighbours=neighbours), mining=MiningConfig(**mining))
        return build(images, config)._skip

    assert skip(NeighboursConfig(), class_prior=0.1) == 0.1
    assert skip(NeighboursConfig(), class_prior=0.1, skip_top=0.2) == 0.2
    assert skip(NeighboursConfig(skip_top=0.05), class_prior=0.1) == 0.05


def test_a_group_that_batches_would_cut_is_refused():
    with pytest.raises(ValueError, match=r"data\.neighbours\.group=8: data\.global_batch=100 is no multiple"):
        DataConfig(order="neighbours", global_batch=100)
    DataConfig(order="neighbours", global_batch=96)

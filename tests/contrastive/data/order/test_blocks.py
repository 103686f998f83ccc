import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import BlocksConfig, DataConfig, PretrainConfig, UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.order import permutation
from contrastive.data.order.blocks import BlockOrder
from contrastive.data.order.build import build_order
from contrastive.data.order.global_ import GlobalOrder
from contrastive.data.plan import Plan, Share
from tests.reference.plan import blocks as reference


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 9)
)
def test_an_epoch_holds_each_row_once_whatever_the_sizes(rows, block, interleave, seed, epoch):
    order = BlockOrder(rows, seed, block, interleave)
    ids = order.ids(epoch, 0, rows)
    assert torch.equal(ids.sort().values, torch.arange(rows))
    half = rows // 2
    assert torch.equal(torch.cat([order.ids(epoch, 0, half), order.ids(epoch, half, rows)]), ids)


@pytest.mark.parametrize(("rows", "block", "interleave"), [(100, 8, 3), (64, 8, 8), (11, 3, 2)])
def test_rows_are_those_of_the_reference(rows, block, interleave):
    found = BlockOrder(rows, 5, block, interleave).ids(2, 0, rows).tolist()
    shift = (found[0] - reference(rows, 5, 2, block, interleave, 0)[0]) % rows
    assert found == reference(rows, 5, 2, block, interleave, shift)


def test_a_batch_is_a_run_of_neighbours_of_each_block():
    """256 rows of blocks of 64, 8 at a time: 8 runs of 32 rows, and the next batch goes on where they end."""
    order = BlockOrder(10_000, 0, 64, 8)
    first, second = (set(order.ids(0, start, start + 256).tolist()) for start in (0, 256))
    starts = [row for row in first if row - 1 not in first]
    assert len(starts) == 8
    assert all({*range(start, start + 32)} <= first for start in starts)
    assert {start + 32 for start in starts} <= second


def test_the_rows_left_over_and_the_neighbours_differ_between_epochs_and_seeds():
    orders = [
        BlockOrder(1000, seed, 16, 4).ids(epoch, 0, 1000).tolist() for seed in range(3) for epoch in range(4)
    ]
    assert len({tuple(ids[-8:]) for ids in orders}) == 12
    assert len({tuple(sorted(ids[:16])) for ids in orders}) == 12


@pytest.mark.parametrize(
    "order", [GlobalOrder(50_000, 7), BlockOrder(50_000, 7, 64, 8)], ids=["global", "blocks"]
)
def test_beyond_the_sorted_sizes_orders_are_permutations_without_a_table(order, monkeypatch):
    monkeypatch.setattr(permutation, "MOST_SORTED", 100)
    monkeypatch.setattr(permutation, "_sorted", None)  # a call would fail
    ids = order.ids(3, 0, 50_000)
    assert torch.equal(ids.sort().values, torch.arange(50_000))
    assert torch.equal(order.ids(3, 777, 800), ids[777:800])
    assert not torch.equal(order.ids(4, 0, 50_000), ids)


def test_steps_are_the_same_at_any_number_of_ranks():
    plan = Plan(1000, 1, 64, 3, BlockOrder(1000, 1, 16, 4))
    for step in (0, 14, 15, 40):
        for world in (2, 4):
            parts = [plan.local_ids(step, 0, Share(rank, world)) for rank in range(world)]
            assert torch.equal(torch.cat(parts), plan.ids(step))


def test_too_few_rows_for_the_blocks_are_refused():
    images = ArrayImages("set", [np.zeros((100, 2, 2, 3), dtype=np.uint8)], 2)
    config = PretrainConfig(data=DataConfig(order="blocks", blocks=BlocksConfig(26, 4)))
    with pytest.raises(UserError, match=r"100 images are fewer than data.blocks.rows=26 x .*interleave=4"):
        build_order(config, images)
    config.data.blocks = BlocksConfig(25, 4)
    assert build_order(config, images) == BlockOrder(100, 0, 25, 4)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import UserError
from contrastive.data.plan import Plan
from tests.reference import plan as reference


@st.composite
def plans(draw):
    """A plan and a way of sharing its batches out."""
    world, accumulate, share = (draw(st.integers(1, 4)) for _ in range(3))
    batch = world * accumulate * share
    rows = draw(st.integers(batch, 5 * batch + 7))
    plan = Plan(rows, draw(st.integers(0, 2**32 - 1)), batch, epochs=3)
    return plan, world, accumulate


@pytest.mark.parametrize(("rows", "seed", "epoch"), [(1, 0, 0), (7, 3, 1), (1335, 2**32 - 1, 199)])
def test_order_is_philox_sorted(rows, seed, epoch):
    plan = Plan(rows, seed, 1, epochs=200)
    assert plan.order(epoch).tolist() == reference.order(rows, seed, epoch)


def test_order_is_pinned():
    # What a resume under another version of any library must find again.
    assert Plan(10, 0, 2, 1).order(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert Plan(10, 1, 2, 2).order(1).tolist() == [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]


def test_order_differs_between_epochs_and_seeds():
    orders = {tuple(Plan(50, seed, 5, 3).order(epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_order_is_uniform():
    """Each row is at each place equally often: chi-square over 2,000 epochs, 25 degrees of freedom."""
    counts = np.zeros((6, 6))
    for epoch in range(2000):
        counts[Plan(6, 0, 6, 2000).order(epoch).numpy(), np.arange(6)] += 1
    expected = 2000 / 6
    assert ((counts - expected) ** 2 / expected).sum() < 52.6  # p = 0.001


def test_order_ignores_and_leaves_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    first = Plan(100, 5, 10, 2).order(1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state().clone(), np.random.get_state()[2]
    assert torch.equal(Plan(100, 5, 20, 9).order(1), first)  # nor does it depend on batch and epochs
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]


def test_order_may_be_written_to():
    plan = Plan(20, 0, 5, 1)
    kept = plan.order(0).clone()
    plan.order(0).zero_()
    plan.ids(0).zero_()
    assert torch.equal(plan.order(0), kept)
    assert torch.equal(plan.ids(0), kept[:5])


@settings(deadline=None, max_examples=60)
@given(plans())
def test_an_epoch_is_a_partition_less_its_tail(case):
    plan, _, _ = case
    for epoch in range(plan.epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = torch.cat([plan.ids(step) for step in steps]).tolist()
        assert {plan.epoch_of(step) for step in steps} == {epoch}
        assert len(set(seen)) == len(seen) == plan.rows // plan.global_batch * plan.global_batch
        tail = plan.order(epoch)[len(seen) :].tolist()
        assert len(tail) < plan.global_batch
        assert sorted(seen + tail) == list(range(plan.rows))


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_ranks_share_exactly_the_ids_of_the_step(case, data):
    plan, world, accumulate = case
    step = data.draw(st.integers(0, plan.total_steps - 1))
    parts = [plan.local_ids(step, m, r, world, accumulate) for m in range(accumulate) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    # By micro-batch and then by rank, end to end: nothing is shared, missing, or hangs on the world size.
    assert torch.equal(torch.cat(parts), plan.ids(step))
    assert torch.equal(plan.local_ids(step, 0, 0, 1, 1), plan.ids(step))


def test_the_tail_changes_with_the_epoch():
    plan = Plan(103, 0, 10, epochs=4)
    assert len({tuple(plan.order(epoch)[-3:].tolist()) for epoch in range(4)}) == 4


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"global_batch=256 .* 100 training images.*100 or less"):
        Plan(100, 0, 256, 1)
    assert Plan(100, 0, 100, 1).total_steps == 1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"global_batch=10 .* 2 ranks x 2 .* 8 or 12"):
        Plan(100, 0, 10, 1).local_ids(0, 0, 0, 2, 2)
    with pytest.raises(UserError, match=r"nearest that do: 16"):
        Plan(100, 0, 10, 1).share(16, 1)


@pytest.mark.parametrize("arguments", [(0, 0, 1, 1), (5, -1, 1, 1), (5, 0, 0, 1), (5, 0, 1, 0)])
def test_senseless_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="1 or more"):
        Plan(*arguments)


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_of_the_plan_is_refused(step):
    plan = Plan(100, 0, 10, 2)
    with pytest.raises(ValueError, match=f"step={step}: the plan has steps 0 to 19"):
        plan.ids(step)


@pytest.mark.parametrize(("micro", "rank"), [(2, 0), (0, 2), (-1, 0), (0, -1)])
def test_a_share_outside_of_the_batch_is_refused(micro, rank):
    with pytest.raises(ValueError, match="must be below its count"):
        Plan(100, 0, 8, 2).local_ids(0, micro, rank, world=2, accumulate=2)


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="epoch=-1"):
        Plan(100, 0, 8, 2).order(-1)

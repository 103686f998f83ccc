import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import UserError
from contrastive.data.order.base import Order
from contrastive.data.plan import WHOLE, Plan, Share


@st.composite
def plans(draw):
    """A plan and a way of sharing its batches out."""
    world, accumulate, share = (draw(st.integers(1, 4)) for _ in range(3))
    batch = world * accumulate * share
    rows = draw(st.integers(batch, 5 * batch + 7))
    plan = Plan(rows, draw(st.integers(0, 2**32 - 1)), batch, epochs=3)
    return plan, world, accumulate


@settings(deadline=None, max_examples=60)
@given(plans())
def test_an_epoch_is_a_partition_less_its_tail(case):
    plan, _, _ = case
    for epoch in range(plan.epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = torch.cat([plan.ids(step) for step in steps]).tolist()
        assert {plan.epoch_of(step) for step in steps} == {epoch}
        assert len(set(seen)) == len(seen) == plan.rows // plan.global_batch * plan.global_batch
        assert plan.epoch_ids(epoch).tolist() == seen
        assert plan.rows - len(seen) < plan.global_batch
        assert {*seen} <= {*range(plan.rows)}


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_ranks_share_exactly_the_ids_of_the_step(case, data):
    plan, world, accumulate = case
    step = data.draw(st.integers(0, plan.total_steps - 1))
    shares = [Share(rank, world, accumulate) for rank in range(world)]
    parts = [plan.local_ids(step, micro, share) for micro in range(accumulate) for share in shares]
    assert len({len(part) for part in parts}) == 1
    # By micro-batch and then by rank, end to end: nothing is shared, missing, or hangs on the world size.
    assert torch.equal(torch.cat(parts), plan.ids(step))
    assert torch.equal(plan.local_ids(step, 0, WHOLE), plan.ids(step))


def test_rows_come_from_the_order():
    class Backwards(Order):
        def ids(self, epoch, start, stop):
            return torch.arange(19 - start, 19 - stop, -1)

    plan = Plan(20, 0, 8, 2, Backwards())
    assert plan.ids(1).tolist() == plan.ids(3).tolist() == [11, 10, 9, 8, 7, 6, 5, 4]
    assert plan.local_ids(2, 1, Share(0, 2, 2)).tolist() == [15, 14]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"global_batch=256 .* which has 100 to train on; .*100 or less"):
        Plan(100, 0, 256, 1)
    assert Plan(100, 0, 100, 1).total_steps == 1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"global_batch=10 .* 2 ranks x 2 .* 8 or 12"):
        Plan(100, 0, 10, 1).local_ids(0, 0, Share(0, 2, 2))
    with pytest.raises(UserError, match=r"nearest that do: 32"):
        Plan(100, 0, 10, 1).local_batch(Share(0, 16))


@pytest.mark.parametrize("arguments", [(0, 0, 1, 1), (5, -1, 1, 1), (5, 0, 0, 1), (5, 0, 1, 0)])
def test_senseless_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="1 or more"):
        Plan(*arguments)


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_of_the_plan_is_refused(step):
    plan = Plan(100, 0, 10, 2)
    with pytest.raises(ValueError, match=f"step={step}: the plan has steps 0 to 19"):
        plan.ids(step)


@pytest.mark.parametrize("micro", [2, -1])
def test_a_micro_batch_outside_of_the_step_is_refused(micro):
    with pytest.raises(ValueError, match="must be below its count"):
        Plan(100, 0, 8, 2).local_ids(0, micro, Share(0, 2, 2))


@pytest.mark.parametrize("share", [(2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)])
def test_senseless_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"the rank must be below|1 or more are needed"):
        Share(*share)


def test_the_length_may_change_and_the_rows_of_a_step_do_not():
    plan, known = Plan(100, 7, 8, None), Plan(100, 7, 8, 3)
    assert (plan.has_end, plan.epochs, plan.total_steps > 10**12) == (False, None, True)
    before = plan.ids(30).tolist()
    plan.end_after(31)
    assert (plan.has_end, plan.epochs, plan.total_steps) == (True, 3, 31)
    assert plan.ids(30).tolist() == before == known.ids(30).tolist()
    with pytest.raises(ValueError, match="step=31: the plan has steps 0 to 30"):
        plan.ids(31)
    plan.end_after(36)
    assert (plan.epochs, plan.total_steps) == (known.epochs, known.total_steps)
    with pytest.raises(ValueError, match="steps=0"):
        plan.end_after(0)

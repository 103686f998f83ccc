"""full_bank against the exact sum over all rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_bank.methods.full_bank import tail_log_weight
from tests.memory_bank.worlds import BATCH, World, miner, run

TEMPERATURE = 0.5


def partition(found, query):
    """The weighted sum over the negatives, one a query."""
    hard = (found.hard[found.hard_index] * query[:, None]).sum(2) / TEMPERATURE + found.hard_log_weight
    shared = query @ found.shared.T / TEMPERATURE + found.shared_log_weight
    return torch.cat([hard, shared], 1).double().exp().sum(1)


def reference(subject, query, key, ids, at):
    """Every admissible row once: fresh keys for the batch, stored ones for the rest, in a loop."""
    rows = {
        int(row): subject.bank.key[slot].double().numpy()
        for slot, row in enumerate(subject.bank.id)
        if row >= 0
    }
    rows |= {int(row): key[position].double().numpy() for position, row in enumerate(ids)}
    total = 0.0
    for row, vector in rows.items():
        if row != int(ids[at]):
            total += np.exp(np.dot(query[at].double().numpy(), vector) / TEMPERATURE)
    return total


def world_at(step=10, **policy):
    world = World()
    subject = miner(world, method="full_bank", **policy)
    run(subject, world, step)
    return subject, world.step(step)


def test_all_rows_drawn_is_the_exact_sum():
    subject, (ids, query, key) = world_at(num_hard=7, num_uniform=96)
    found = partition(subject.negatives(query, key, ids, 10), query)
    for at in range(BATCH):
        assert float(found[at]) == pytest.approx(reference(subject, query, key, ids, at), rel=1e-5)


def test_all_rows_is_the_exact_sum():
    world, subject = World(), miner(method="all_rows")
    run(subject, world, 10)
    ids, query, key = world.step(10)
    found = partition(subject.negatives(query, key, ids, 10), query)
    for at in range(BATCH):
        assert float(found[at]) == pytest.approx(reference(subject, query, key, ids, at), rel=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        {"num_hard": 10},
        {"num_hard": 0},
        {"num_hard": 10, "query": "stored", "lag": 2},
        {"num_hard": 10, "backend": "subsample", "sample": 30},
    ],
)
def test_the_estimate_is_unbiased_over_draws(policy):
    """Also when the retrieved rows are not the nearest: look-ups two steps old."""
    subject, (ids, query, key) = world_at(num_uniform=12, **policy)
    exact = torch.tensor([reference(subject, query, key, ids, at) for at in range(BATCH)])
    draws = []
    for seed in range(400):
        subject.seed = seed
        draws.append(partition(subject.negatives(query, key, ids, 10), query))
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)))
    assert error.abs().max() < 4, "twelve queries, 4 standard errors"
    assert draws.std(0).min() > 0


def test_retrieved_rows_make_the_estimate_sharper():
    spread = {}
    for num_hard in (0, 20):
        subject, (ids, query, key) = world_at(num_hard=num_hard, num_uniform=12)
        draws = []
        for seed in range(60):
            subject.seed = seed
            draws.append(partition(subject.negatives(query, key, ids, 10), query))
        spread[num_hard] = float((torch.stack(draws).std(0) / torch.stack(draws).mean(0)).mean())
    assert spread[20] < 0.5 * spread[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8), st.integers(0, 12), st.integers(0, 10_000))
def test_weights_stand_for_the_tail(num_retrieved, num_drawn, seed):
    rng = np.random.default_rng(seed)
    rows, own = 15, int(rng.integers(20))
    admissible = [row for row in range(20) if row != own][:rows]
    retrieved = rng.permutation(admissible)[:num_retrieved]
    drawn = rng.permutation(20)[:num_drawn]
    weight = tail_log_weight(
        torch.from_numpy(np.r_[drawn, -1].astype(np.int64)),
        torch.from_numpy((np.r_[drawn, -1] == own) | np.isin(np.r_[drawn, -1], retrieved))[None],
        torch.tensor([rows - num_retrieved]),
    )[0].exp()
    tail = [row for row in drawn if row != own and row not in retrieved]
    for row, value in zip(np.r_[drawn, -1], weight.tolist(), strict=True):
        expected = (rows - num_retrieved) / len(tail) if row in tail else 0.0
        assert value == pytest.approx(expected)

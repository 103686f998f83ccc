import math
from dataclasses import replace

import pytest
import torch

from contrastive.objectives.info_nce import info_nce
from memory_bank.negatives import Negatives
from tests.contrastive.objectives.cases import close, make_case, unit
from tests.reference import losses as reference


@pytest.mark.parametrize(("k", "m", "p"), [(4, 6, 2), (4, 0, 0), (0, 6, 0), (0, 0, 2)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_equals_the_loops(k, m, p, temperature):
    case = make_case(k=k, m=m, p=p)
    got, _ = info_nce(case.query, case.key, case.negatives, temperature=temperature)
    close(got, reference.info_nce(case.queries, case.positives, case.others, temperature))


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_equal_logits_give_log_of_one_plus_k(count):
    row = unit(1, 4, seed=0)
    negatives = replace(
        Negatives.none(row),
        shared=row.expand(count, -1),
        shared_log_weight=torch.zeros(1, count, dtype=row.dtype),
        shared_ids=torch.arange(count),
    )
    got, _ = info_nce(row, row, negatives, temperature=0.1)
    close(got, math.log(1 + count))


def test_one_more_negative_never_lowers_it():
    case = make_case(k=0, m=12, weighted=False)
    n = case.negatives
    values = [
        info_nce(
            case.query,
            case.key,
            replace(
                n,
                shared=n.shared[:m],
                shared_log_weight=n.shared_log_weight[:, :m],
                shared_ids=n.shared_ids[:m],
            ),
            temperature=0.2,
        )[0]
        for m in range(13)
    ]
    assert values == sorted(values)
    assert values[0] == 0 < values[-1]


def test_shared_negatives_take_memory_of_the_logits_only():
    """(b, m, d) would be 128 times the logits."""
    b, m, d = 64, 4096, 128
    query = unit(b, d, seed=0, dtype=torch.float32).requires_grad_()
    negatives = replace(
        Negatives.none(query.detach()),
        shared=unit(m, d, seed=1, dtype=torch.float32),
        shared_log_weight=torch.zeros(b, m),
        shared_ids=torch.arange(m),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        info_nce(query, query.detach(), negatives, temperature=0.2)[0].backward()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert b * m * 4 <= largest <= 4 * b * m * 4


@pytest.mark.parametrize("max_age", [None, 4])
@pytest.mark.parametrize("num_uniform", [0, 12])
def test_full_bank_at_the_banks_size_is_the_loss_over_all_rows(num_uniform, max_age):
    """In value and gradient, against a loop over the bank as well."""
    from tests.memory_bank.worlds import BATCH, ROWS, World, miner, run

    world, losses, gradients = World(), [], []
    for policy in (
        {"method": "full_bank", "num_hard": ROWS, "num_uniform": num_uniform},
        {"method": "all_rows"},
    ):
        subject = miner(bank={"max_age": max_age, "dtype": "float32"}, **policy)
        run(subject, world, 10)
        ids, query, key = world.step(10)
        query = query.double().requires_grad_()
        negatives = subject.negatives(query.detach(), key, ids, 10)
        loss, _ = info_nce(query, key.double(), negatives, temperature=0.2)
        loss.backward()
        losses.append(loss.item())
        gradients.append(query.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)

    rows = {}
    for step in range(10 - (max_age or 10), 10):
        written, _, keys = world.step(step)
        rows |= dict(zip(written.tolist(), keys.double().numpy(), strict=True))
    rows |= dict(zip(ids.tolist(), key.double().numpy(), strict=True))  # fresh ones stand for their slots
    assert (len(rows) == ROWS) == (max_age is None)
    others = [[vector for row, vector in rows.items() if row != int(ids[at])] for at in range(BATCH)]
    expected = reference.info_nce(
        query.detach().numpy(),
        [([vector], [1.0]) for vector in key.double().numpy()],
        [(vectors, [1.0] * len(vectors)) for vectors in others],
        0.2,
    )
    assert losses[1] == pytest.approx(expected, rel=1e-6)

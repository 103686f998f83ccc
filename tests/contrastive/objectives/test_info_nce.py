import math
from dataclasses import replace

import pytest
import torch

from tests.contrastive.objectives.cases import close, make_case, unit
from tests.reference import losses as reference


@pytest.mark.parametrize(("k", "m", "p"), [(4, 6, 2), (4, 0, 0), (0, 6, 0), (0, 0, 2)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_equals_the_loops(k, m, p, temperature):
    from contrastive.objectives.info_nce import info_nce

    case = make_case(k=k, m=m, p=p)
    got, _ = info_nce(case.query, case.key, case.negatives, temperature=temperature)
    close(got, reference.info_nce(case.queries, case.positives, case.others, temperature))


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_equal_logits_give_log_of_one_plus_k(count):
    from contrastive.objectives.info_nce import info_nce
    from memory_bank.negatives import Negatives

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
    from contrastive.objectives.info_nce import info_nce

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
    from contrastive.objectives.info_nce import info_nce
    from memory_bank.negatives import Negatives

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

from dataclasses import replace

import pytest
import torch

from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.mixing import _mix, mixing
from tests.contrastive.objectives.cases import close, make_case
from tests.contrastive.objectives.test_common import permuted
from tests.reference import losses as reference


def uniform(b, count, seed=5):
    return torch.rand(b, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(case, numbers, hardest=4, pairs=3, with_query=2, temperature=0.5):
    return mixing(
        case.query,
        case.key,
        case.negatives,
        temperature=temperature,
        hardest=hardest,
        num_pairs=pairs,
        num_query=with_query,
        uniforms=numbers,
    )[0]


def reference_value(case, numbers, hardest=4, pairs=3, with_query=2):
    others = []
    for query, (rows, weights), row in zip(case.queries, case.others, numbers.numpy(), strict=True):
        synthetic = reference.mixed(query, (rows, weights), hardest, pairs, with_query, row)
        others.append(([*rows, *synthetic], [*weights, *[1.0] * len(synthetic)]))
    return reference.info_nce(case.queries, case.positives, others, 0.5)


@pytest.mark.parametrize(("k", "m"), [(4, 6), (4, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize(("hardest", "pairs", "with_query"), [(4, 3, 2), (1, 2, 0), (100, 0, 3)])
def test_equals_the_loops(k, m, hardest, pairs, with_query):
    case = make_case(k=k, m=m)
    numbers = uniform(5, 3 * pairs + 2 * with_query)
    close(
        run(case, numbers, hardest, pairs, with_query),
        reference_value(case, numbers, hardest, pairs, with_query),
    )


def test_the_order_of_the_negatives_does_not_matter():
    case, numbers = make_case(), uniform(5, 13)
    moved = replace(case, negatives=permuted(case.negatives))
    torch.testing.assert_close(run(case, numbers), run(moved, numbers), rtol=1e-12, atol=1e-12)


def test_only_the_uniforms_are_random():
    case = make_case()
    assert run(case, uniform(5, 13)) == run(case, uniform(5, 13))
    assert run(case, uniform(5, 13)) != run(case, uniform(5, 13, seed=6))


def test_synthetic_negatives_only_make_it_harder():
    case = make_case()
    plain, _ = info_nce(case.query, case.key, case.negatives, temperature=0.5)
    assert run(case, uniform(5, 13)) > plain
    assert run(case, uniform(5, 0), pairs=0, with_query=0) == plain


def test_the_gradient_takes_synthetic_rows_as_constants():
    case, numbers = make_case(), uniform(5, 13)
    query = case.query.clone().requires_grad_()
    run(replace(case, query=query), numbers).backward()
    fixed = _mix(case.query, case.negatives, 4, 3, 2, numbers)
    assert torch.autograd.gradcheck(
        lambda q: info_nce(q, case.key, fixed, temperature=0.5)[0], (case.query.clone().requires_grad_(),)
    )
    other = case.query.clone().requires_grad_()
    info_nce(other, case.key, fixed, temperature=0.5)[0].backward()
    torch.testing.assert_close(query.grad, other.grad)


def test_too_few_uniforms():
    with pytest.raises(ValueError, match="12 uniforms: hardest >= 1, counts >= 0 and 13 uniforms"):
        run(make_case(), uniform(5, 12))

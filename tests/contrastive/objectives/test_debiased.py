import pytest
import torch

from contrastive.objectives import debiased as module
from contrastive.objectives.debiased import debiased, hcl
from contrastive.objectives.info_nce import info_nce
from tests.contrastive.objectives.cases import close, make_case
from tests.reference import losses as reference

SETTINGS = {"temperature": 0.5, "hard_weighted": True}


@pytest.mark.parametrize(("tau_plus", "beta"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1.0), (0.0, 2.0), (0.6, 0.5)])
@pytest.mark.parametrize(("k", "m", "p"), [(4, 6, 2), (0, 6, 0), (0, 0, 1)])
def test_hcl_equals_the_loops(tau_plus, beta, k, m, p):
    case = make_case(k=k, m=m, p=p)
    got, _ = hcl(case.query, case.key, case.negatives, tau_plus=tau_plus, beta=beta, **SETTINGS)
    close(got, reference.hcl(case.queries, case.positives, case.others, 0.5, tau_plus, beta))


def test_the_floor_is_reached_and_tested():
    """With keys equal to queries and far negatives, tau_plus e^s exceeds the mean of the negatives."""
    from dataclasses import replace

    case = make_case(k=0, p=0)
    case = replace(
        case, key=case.query, negatives=replace(case.negatives, shared=-case.query[:1].repeat(6, 1))
    )
    query = case.query.clone().requires_grad_()
    got, _ = debiased(query, case.key, case.negatives, temperature=0.5, tau_plus=0.3)
    close(got, reference.hcl(case.queries, case.positives, case.others, 0.5, 0.3, 0.0))
    got.backward()
    # At the floor the negatives are a constant: the gradient is along the key alone.
    residue = query.grad[0] - (query.grad[0] @ case.key[0]) * case.key[0]
    assert residue.abs().max() < 1e-12
    assert query.grad[0].abs().max() > 0


@pytest.mark.parametrize("tau_plus", [0.05, 0.3])
def test_debiased_is_hcl_at_beta_zero(tau_plus):
    case = make_case()
    got, _ = debiased(case.query, case.key, case.negatives, tau_plus=tau_plus, **SETTINGS)
    close(got, reference.hcl(case.queries, case.positives, case.others, 0.5, tau_plus, 0.0))


def test_hcl_at_zero_is_info_nce_in_value_and_gradient():
    case = make_case()
    query = case.query.requires_grad_()
    plain, _ = info_nce(query, case.key, case.negatives, temperature=0.5)
    (expected,) = torch.autograd.grad(plain, query)
    weighted, _ = hcl(query, case.key, case.negatives, tau_plus=0.0, beta=0.0, **SETTINGS)
    (got,) = torch.autograd.grad(weighted, query)
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_beta_moves_towards_the_hardest_negative():
    case = make_case()
    values = [
        hcl(case.query, case.key, case.negatives, tau_plus=0.0, beta=beta, **SETTINGS)[0]
        for beta in (0.0, 0.5, 2.0, 8.0)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("name", ["debiased", "hcl"])
def test_hard_mined_negatives_are_refused_unless_weighted(name):
    case = make_case()
    extra = {"beta": 1.0} if name == "hcl" else {}
    with pytest.raises(ValueError, match=r"4 hard-mined negatives per query.*mining\.num_hard=0"):
        getattr(module, name)(case.query, case.key, case.negatives, temperature=0.5, tau_plus=0.1, **extra)


@pytest.mark.parametrize(("tau_plus", "beta"), [(1.0, 0.0), (-0.1, 0.0), (0.1, -1.0)])
def test_ranges(tau_plus, beta):
    case = make_case()
    with pytest.raises(ValueError, match="0 <= tau_plus < 1"):
        hcl(case.query, case.key, case.negatives, tau_plus=tau_plus, beta=beta, **SETTINGS)

import pytest
import torch

from contrastive.objectives.decoupled import dcl, dclw
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Logits
from tests.contrastive.objectives.cases import close, make_case, without_extras
from tests.reference import losses as reference


@pytest.mark.parametrize(("k", "m", "p"), [(4, 6, 2), (4, 0, 0), (0, 6, 0), (0, 0, 2)])
def test_dcl_equals_the_loops(k, m, p):
    case = make_case(k=k, m=m, p=p)
    got, _ = dcl(case.query, case.key, case.negatives, temperature=0.1)
    close(got, reference.dcl(case.queries, case.positives, case.others, 0.1))


@pytest.mark.parametrize("sigma", [0.3, 0.5])
def test_dclw_equals_the_loops(sigma):
    case = make_case()
    got, _ = dclw(case.query, case.key, case.negatives, temperature=0.1, sigma=sigma)
    close(got, reference.dclw(case.queries, case.positives, case.others, 0.1, sigma))


def test_dcl_differs_from_info_nce_by_the_positive_in_the_denominator():
    """With a share p of the softmax on the positive, dcl = info_nce + log(1 - p), query by query."""
    case = without_extras(make_case())
    for i in range(len(case.query) - 1):  # the last query has no negative
        one = make_row(case, i)
        nce, _ = info_nce(one.query, one.key, one.negatives, temperature=0.5)
        decoupled, _ = dcl(one.query, one.key, one.negatives, temperature=0.5)
        logits = Logits.of(one.query, one.key, one.negatives, 0.5)
        parts = torch.cat([logits.positive, logits.negative + logits.log_weight], 1)
        share = torch.softmax(parts, 1)[0, 0]
        close(decoupled, float(nce + torch.log(1 - share)))


def make_row(case, i):
    from dataclasses import replace

    n = case.negatives
    rows = slice(i, i + 1)
    return replace(
        case,
        query=case.query[rows],
        key=case.key[rows],
        negatives=replace(
            n,
            hard_index=n.hard_index[rows],
            hard_log_weight=n.hard_log_weight[rows],
            hard_ids=n.hard_ids[rows],
            shared_log_weight=n.shared_log_weight[rows],
            extra_positives=n.extra_positives[rows],
            extra_positive_weight=n.extra_positive_weight[rows],
        ),
    )


def test_the_gradient_of_dclw_takes_its_weights_as_constants():
    case = without_extras(make_case(b=4))
    query = case.query.requires_grad_()
    dclw(query, case.key, case.negatives, temperature=0.5, sigma=0.5)[0].backward()
    weighted, query.grad = query.grad, None
    dcl(query, case.key, case.negatives, temperature=0.5)[0].backward()
    cosine = (case.query.detach() * case.key).sum(1)
    pull = 2 - (cosine / 0.5).exp() / (cosine / 0.5).exp().mean()
    expected = query.grad - (pull - 1)[:, None] * case.key / 0.5 / 4
    torch.testing.assert_close(weighted[:-1], expected[:-1])
    assert (weighted[-1] == 0).all()


def test_sigma_must_be_positive():
    case = make_case()
    with pytest.raises(ValueError, match="sigma=0"):
        dclw(case.query, case.key, case.negatives, temperature=0.5, sigma=0.0)

"""Test properties that every objective has."""

from dataclasses import replace

import pytest
import torch

from contrastive.config import ObjectiveConfig
from contrastive.objectives import logits
from contrastive.objectives.build import build_objective
from contrastive.objectives.info_nce import info_nce
from memory_bank.config import MiningConfig
from memory_bank.negatives import Negatives
from tests.contrastive.objectives.cases import NAMES, Case, all_losses, make_case, unit


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def loss(name):
    return all_losses()[name]


def value(loss, case):
    return loss(case.query, case.key, case.negatives)[0]


def permuted(negatives, seed=3):
    generator = torch.Generator().manual_seed(seed)
    hard = torch.randperm(negatives.hard_index.shape[1], generator=generator)
    shared = torch.randperm(len(negatives.shared), generator=generator)
    return replace(
        negatives,
        hard_index=negatives.hard_index[:, hard],
        hard_log_weight=negatives.hard_log_weight[:, hard],
        hard_ids=negatives.hard_ids[:, hard],
        shared=negatives.shared[shared],
        shared_log_weight=negatives.shared_log_weight[:, shared],
        shared_ids=negatives.shared_ids[shared],
    )


# dclw's weights and mixing's rows are constants by definition, which finite differences cannot know; their
# own files check the gradient.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dclw", "mixing")])
def test_gradcheck(loss):
    case = make_case(b=3, d=4, k=3, m=3, p=2)
    query = case.query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(q, case.key, case.negatives)[0], (query,))


def test_gradient_is_finite_with_excluded_rows_and_an_empty_query(loss):
    case = make_case()
    query = case.query.requires_grad_()
    loss(query, case.key, case.negatives)[0].backward()
    assert torch.isfinite(query.grad).all()
    assert query.grad.abs().sum() > 0


@pytest.mark.parametrize("excluded", [False, True], ids=["no rows", "all rows excluded"])
def test_no_negatives(name, loss, excluded):
    case = make_case()
    query = case.query.requires_grad_()
    negatives = Negatives.none(case.query.detach())
    if excluded:
        negatives = replace(
            case.negatives,
            hard_log_weight=torch.full_like(case.negatives.hard_log_weight, -torch.inf),
            shared_log_weight=torch.full_like(case.negatives.shared_log_weight, -torch.inf),
            extra_positives=negatives.extra_positives,
            extra_positive_weight=negatives.extra_positive_weight,
        )
    got, diagnostics = loss(query, case.key, negatives)
    got.backward()
    assert torch.isfinite(query.grad).all()
    assert all(torch.isfinite(entry) for entry in diagnostics.values())
    assert got == 0
    assert (query.grad == 0).all()


def test_permuting_negatives_changes_nothing(loss):
    case = make_case()
    moved = replace(case, negatives=permuted(case.negatives))
    torch.testing.assert_close(value(loss, case), value(loss, moved), rtol=1e-12, atol=1e-12)


def test_an_excluded_row_counts_as_absent(loss):
    case = make_case()
    negatives = case.negatives
    noisy = replace(
        negatives,
        hard=torch.where(
            torch.isinf(negatives.hard_log_weight).flatten()[:, None], unit(7, seed=77), negatives.hard
        ),
    )
    torch.testing.assert_close(value(loss, case), value(loss, replace(case, negatives=noisy)))


def test_a_positive_of_weight_zero_counts_as_absent(loss):
    case = make_case()
    negatives = case.negatives
    zero = negatives.extra_positive_weight == 0
    assert zero.any()
    noisy = replace(
        negatives, extra_positives=torch.where(zero[..., None], unit(7, seed=78), negatives.extra_positives)
    )
    torch.testing.assert_close(value(loss, case), value(loss, replace(case, negatives=noisy)))


@pytest.mark.parametrize("shared", [0, 32])
def test_own_rows_are_compared_by_a_copy_or_by_a_product_with_all(monkeypatch, shared):
    monkeypatch.setattr(logits, "_SHARED", shared)
    query, rows = unit(5, 7, seed=1).requires_grad_(), unit(6, 7, seed=2)
    index = torch.tensor([[0, 5, 2]] * 4 + [[1, 1, 1]])
    found = logits.own_similarity(query, rows, index)
    (found * torch.arange(1.0, 4)).sum().backward()
    for i in range(5):
        own = rows[index[i]]
        torch.testing.assert_close(found[i], own @ query[i])
        torch.testing.assert_close(query.grad[i], torch.arange(1.0, 4, dtype=torch.float64) @ own)
    assert logits.own_similarity(query, rows, index[:, :0]).shape == (5, 0)
    assert logits.own_similarity(query, rows[:0], index[:, :0]).shape == (5, 0)


def test_hard_and_shared_negatives_are_one_vocabulary(loss):
    """The same rows, handed over per query or shared, give the same loss."""
    case = make_case(k=0)
    negatives = case.negatives
    b, m = negatives.shared_log_weight.shape
    moved = replace(
        negatives,
        hard=negatives.shared,
        hard_index=torch.arange(m).expand(b, m),
        hard_log_weight=negatives.shared_log_weight,
        hard_ids=negatives.shared_ids.expand(b, m).clone(),
        shared=negatives.shared[:0],
        shared_log_weight=negatives.shared_log_weight[:, :0],
        shared_ids=negatives.shared_ids[:0],
    )
    torch.testing.assert_close(value(loss, case), value(loss, replace(case, negatives=moved)))


# A row held twice is another random draw for mixing.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixing"])
def test_a_weight_of_two_is_two_rows(loss):
    case = make_case(k=0, weighted=False)
    negatives = case.negatives
    double = replace(
        negatives, shared_log_weight=negatives.shared_log_weight + torch.log(torch.tensor(2.0)).double()
    )
    twice = replace(
        negatives,
        shared=negatives.shared.repeat(2, 1),
        shared_log_weight=negatives.shared_log_weight.repeat(1, 2),
        shared_ids=negatives.shared_ids.repeat(2),
    )
    got = value(loss, replace(case, negatives=double))
    torch.testing.assert_close(got, value(loss, replace(case, negatives=twice)), rtol=1e-7, atol=1e-7)


def test_float32_under_autocast(loss):
    case = make_case(dtype=torch.float32)
    expected = value(loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, diagnostics = loss(case.query, case.key, case.negatives)
    assert got.dtype == torch.float32
    assert got == expected
    assert all(entry.dtype == torch.float32 for entry in diagnostics.values())


def test_half_precision_rows_are_widened(loss):
    case = make_case(dtype=torch.float32)
    negatives = replace(case.negatives, hard=case.negatives.hard.half(), shared=case.negatives.shared.half())
    got, _ = loss(case.query.half(), case.key.half(), negatives)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, value(loss, case), rtol=5e-3, atol=5e-3)


def test_extreme_logits_stay_finite(name):
    """Similarities of 1 and -1 at temperature 0.01 overflow exp in float32."""
    case = make_case(dtype=torch.float32, k=0, p=0)
    query = case.query.clone().requires_grad_()
    negatives = replace(case.negatives, shared=torch.cat([case.query[:3], -case.query[:3]]))
    config = ObjectiveConfig(name=name, temperature=0.01, tau_plus=0.1)
    objective = build_objective(config, MiningConfig(num_hard=0), labels=torch.zeros(40, dtype=torch.int64))
    got, diagnostics = objective(query, case.key, negatives, ids=torch.arange(len(query)))
    got.backward()
    assert torch.isfinite(got)
    assert torch.isfinite(query.grad).all()
    assert all(torch.isfinite(entry) for entry in diagnostics.values())


def test_temperature_must_be_positive():
    case = make_case()
    with pytest.raises(ValueError, match=r"temperature=0\.0: more than 0"):
        info_nce(case.query, case.key, case.negatives, temperature=0.0)


def test_diagnostics_are_detached_scalars_by_hand():
    # Query 0: key at cosine 0.6, negatives at 0.8 and (excluded) 1. Query 1: key at 1, negatives 0.6 and 0.
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    key = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    negatives = replace(
        Negatives.none(query.detach()),
        shared=torch.tensor([[0.8, 0.6], [1.0, 0.0]]),
        shared_log_weight=torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]),
        shared_ids=torch.tensor([4, 5]),
    )
    _, diagnostics = info_nce(query, key, negatives, temperature=1.0)
    assert not any(entry.requires_grad for entry in diagnostics.values())
    assert diagnostics["accuracy"] == 0.5
    torch.testing.assert_close(diagnostics["positive_similarity"], torch.tensor(0.8))
    torch.testing.assert_close(diagnostics["negative_similarity"], torch.tensor((0.8 + 0.6 + 0.0) / 3))
    share = torch.softmax(torch.tensor([0.6, 0.0]), 0)
    torch.testing.assert_close(diagnostics["effective_negatives"], (1 + 1 / (share**2).sum()) / 2)


def test_case_is_what_it_says():
    case = make_case()
    assert isinstance(case, Case)
    weights = torch.cat([case.negatives.hard_log_weight, case.negatives.shared_log_weight], 1)
    assert torch.isinf(weights[-1]).all()
    assert torch.isfinite(weights[:-1]).any(1).all()

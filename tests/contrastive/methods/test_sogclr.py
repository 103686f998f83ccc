"""SogCLR against loops over algorithm 1 of the paper."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from contrastive.config import UserError
from contrastive.distributed import Rows
from tests import tiny
from tests.reference import losses as reference

TEMPERATURE = 0.2


def method(*overrides):
    """The method, with embeddings in place of views."""
    module = tiny.module("method=sogclr", f"objective.temperature={TEMPERATURE}", *overrides)
    module.networks.embed = lambda view: view
    return module.method


def batch(seed, ids):
    """Embeddings of two views that resemble each other, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(len(ids), 8, generator=generator)
    second = first + 0.5 * torch.randn(len(ids), 8, generator=generator)
    views = [normalize(view, dim=1).requires_grad_() for view in (first, second)]
    return views, Rows.of(torch.tensor(ids))


def as_numpy(views):
    return [view.detach().double().numpy() for view in views]


@pytest.mark.parametrize("gamma", [0.3, 0.9, 1.0])
def test_denominators_and_gradients_are_those_of_the_algorithm(gamma):
    subject, known = method(f"objective.gamma={gamma}"), {}
    for step, ids in enumerate([[3, 7, 1, 12, 30], [3, 2, 12, 9], [7, 3, 2, 39, 0]]):
        views, rows = batch(step, ids)
        loss = subject.step(views, rows, step).loss
        loss.backward()
        known = reference.sogclr_denominators(as_numpy(views), ids, known, TEMPERATURE, gamma)
        found = subject.log_denominator.exp()
        assert found[list(known)].tolist() == pytest.approx(list(known.values()), rel=1e-5)
        expected = reference.sogclr_gradients(as_numpy(views), ids, known, TEMPERATURE)
        for view, gradient in zip(views, expected, strict=True):
            np.testing.assert_allclose(view.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)
        similarity = (views[0] * views[1]).sum(1) / TEMPERATURE
        mean = np.mean([np.log(known[row]) for row in ids]) - similarity.mean().item()
        assert loss.item() == pytest.approx(mean, rel=1e-5)
    unseen = [row for row in range(40) if row not in known]
    assert len(set(subject.log_denominator[unseen].tolist())) == 1


def test_with_gamma_1_it_is_simclr_without_the_positive_in_the_denominator():
    """The mean over both views of the two directions' negatives inside one logarithm, and its gradient."""
    subject, (views, rows) = method("objective.gamma=1"), batch(0, [3, 7, 1, 12])
    subject.step(*batch(1, [3, 7, 1, 12]), 0)  # which leaves nothing behind
    loss = subject.step(views, rows, 1).loss
    loss.backward()
    plain = [view.detach().clone().requires_grad_() for view in views]
    terms = []
    for i in range(4):
        others = torch.stack([view[j] for j in range(4) if j != i for view in plain])
        mean = torch.cat([others @ view[i] / TEMPERATURE for view in plain]).exp().mean()
        terms.append(mean.log() - plain[0][i] @ plain[1][i] / TEMPERATURE)
    expected = torch.stack(terms).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for view, other in zip(views, plain, strict=True):
        torch.testing.assert_close(view.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_row_outside_the_batch_keeps_its_denominator():
    subject = method()
    subject.step(*batch(0, [3, 7, 1]), 0)
    before = subject.log_denominator.clone()
    subject.step(*batch(1, [7, 5, 2]), 1)
    changed = (subject.log_denominator != before).nonzero()[:, 0]
    assert changed.tolist() == [2, 5, 7]


def test_a_step_that_is_not_taken_leaves_the_denominators_as_they_were():
    module = tiny.module("method=sogclr")
    module.guard.attach(module)
    before = module.method.log_denominator.clone()
    module.training_step(tiny.batch(), 0)
    assert not torch.equal(module.method.log_denominator, before)
    module.guard._buffers.restore()
    assert torch.equal(module.method.log_denominator, before)


def test_any_temperature_is_finite():
    module = tiny.module("method=sogclr", "objective.temperature=0.002", "objective.gamma=0.5")
    module.networks.embed = lambda view: view
    for step in range(2):
        views, rows = batch(step, [1, 2, 3])
        loss = module.method.step(views, rows, step).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(views[0].grad).all()
    module.guard.attach(module)
    module.guard.check_weights(2)


def test_each_image_has_a_denominator_however_small_the_bank():
    module = tiny.module("method=sogclr", "bank.kind=queue", "bank.capacity=8")
    assert module.method.log_denominator.shape == (40,)
    assert torch.isfinite(module.training_step(tiny.batch(), 0))


def test_a_loss_that_it_cannot_use_is_refused():
    with pytest.raises(UserError, match=r"objective\.name=dcl: method=sogclr has a loss of its own"):
        tiny.module("method=sogclr", "objective.name=dcl")

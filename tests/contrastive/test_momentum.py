import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from contrastive.momentum import Ema, momentum_at


def pair():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    target = copy.deepcopy(online).requires_grad_(False)
    for weight in online.parameters():
        weight.data.normal_()
    online(torch.randn(8, 3))  # moves the statistics and the counter
    return online, target


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_parameters_follow_the_formula(momentum):
    online, target = pair()
    before = [weight.clone().numpy().astype(np.float64) for weight in target.parameters()]
    Ema(online, target)(momentum)
    for old, new, source in zip(before, target.parameters(), online.parameters(), strict=True):
        expected = momentum * old + (1 - momentum) * source.detach().numpy()
        np.testing.assert_allclose(new.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_copied():
    online, target = pair()
    Ema(online, target)(0.99)
    assert torch.equal(target[1].running_mean, online[1].running_mean)
    assert torch.equal(target[1].running_var, online[1].running_var)
    assert target[1].num_batches_tracked.item() == 1


def test_the_online_network_and_its_graph_are_untouched():
    online, target = pair()
    before = copy.deepcopy(online.state_dict())
    Ema(online, target)(0.5)
    assert all(torch.equal(before[name], value) for name, value in online.state_dict().items())
    assert all(weight.requires_grad for weight in online.parameters())
    assert not any(weight.requires_grad for weight in target.parameters())


def test_modules_of_other_structure_are_refused():
    online, _ = pair()
    with pytest.raises(ValueError, match=r"2\.weight: differs"):
        Ema(online, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"2\.bias: differs"):
        Ema(online, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=f"momentum={momentum}"):
        Ema(*pair())(momentum)


def test_schedule():
    for step in range(11):
        byol = 1 - (1 - 0.99) * (math.cos(math.pi * step / 10) + 1) / 2
        assert momentum_at(step, 10, 0.99, 1.0) == pytest.approx(byol, abs=1e-15)
    assert momentum_at(0, 10, 0.99, 0.999) == pytest.approx(0.99)
    assert momentum_at(5, 10, 0.99, 0.999) == pytest.approx((0.99 + 0.999) / 2)
    assert momentum_at(12, 10, 0.99, 0.999) == 0.999
    assert momentum_at(7, 10, 0.99, None) == 0.99


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
@pytest.mark.parametrize("end", [None, 1.0])
def test_steps_out_of_range_are_refused(step, total, end):
    with pytest.raises(ValueError, match=f"step={step}, total={total}: 0 <= step"):
        momentum_at(step, total, 0.99, end)

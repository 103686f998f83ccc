import math

import numpy as np
import pytest
import torch
from torch import nn

from contrastive import optim
from contrastive.config import OptimizerConfig
from contrastive.encoders.build import build_arch
from contrastive.encoders.spec import ArchSpec
from contrastive.optim import LARS, LARS_TRUST, build_optimizer, learning_rate, parameter_groups
from tests.reference import losses as reference


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5), nn.LayerNorm(5)
    )


def config(**settings):
    return OptimizerConfig(**settings)


def test_norms_and_biases_are_not_decayed():
    model = network()
    decayed, plain = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in plain["params"]} == everything - {id(p) for p in decayed["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [
        ("timm:test_vit", {"cls_token", "pos_embed"}),
        ("timm:test_vit2", {"reg_token", "pos_embed"}),
        ("timm:test_convnext", set()),
        ("torchvision:convnext_tiny", {"features.1.0.layer_scale", "features.7.2.layer_scale"}),
        ("torchvision:vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("torchvision:swin_t", {"features.1.0.attn.relative_position_bias_table"}),
    ],
)
def test_positions_tokens_and_layer_scales_are_not_decayed(name, undecayed):
    with torch.device("meta"):
        encoder = build_arch(ArchSpec(name), 32)
    network = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(network, 0.1))
    names = dict(encoder.network.named_parameters())
    assert undecayed <= {key for key, value in names.items() if id(value) in plain}
    assert all(
        id(value) in decayed for key, value in names.items() if value.ndim == 4 and "pos_embed" not in key
    )


def test_a_network_names_what_is_not_decayed():
    class Scaled(nn.Linear):
        def no_weight_decay(self):
            return {"weight"}

    model = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2))
    decayed, _ = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    held = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert not held & {id(p) for p in model[0].parameters()}
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adamw", "AdamW"), ("lars", "LARS")])
def test_build(name, kind):
    optimizer = build_optimizer(
        network(), config(name=name, base_lr=0.3, weight_decay=0.01, sgd_momentum=0.8), 512
    )
    assert type(optimizer).__name__ == kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.6, 0.6]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    if name != "adamw":
        assert all(group["momentum"] == 0.8 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_that_somebody_looks_at_are_not_left_to_a_fused_kernel(monkeypatch, name):
    """Lightning's clipping and torch's loss scale go by what the optimizer says of itself."""
    monkeypatch.setattr(optim, "_on_cuda", lambda groups: True)
    for fuse in (True, False):
        built = optim.build_optimizer(network(), config(name=name), 256, fuse=fuse)
        assert getattr(built, "_step_supports_amp_scaling", False) == fuse


def test_decay_shrinks_weights_only():
    """With gradients of zero a step is decay alone."""
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, config(base_lr=0.5, weight_decay=0.1), 256)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_five_steps_of_a_network_equal_the_loops(name):
    """Weights are decayed (and, by LARS, adapted); norms and biases are not."""
    model = network().double()
    before = {key: value.detach().numpy().copy() for key, value in model.named_parameters()}
    generator = np.random.default_rng(0)
    gradients = {key: [generator.normal(size=value.shape) for _ in range(5)] for key, value in before.items()}
    optimizer = build_optimizer(
        model, config(name=name, base_lr=0.1, weight_decay=0.3, sgd_momentum=0.8), 512
    )
    rates = [0.2, 0.15, 0.1, 0.05, 0.01]
    for step, rate in enumerate(rates):
        for key, value in model.named_parameters():
            value.grad = torch.tensor(gradients[key][step])
        for group in optimizer.param_groups:
            assert step or group["lr"] == pytest.approx(0.2)
            group["lr"] = rate
        optimizer.step()
    for key, value in model.named_parameters():
        decay = 0.3 if value.ndim > 1 else 0.0
        arguments = (before[key], gradients[key], rates)
        expected = {
            "sgd": lambda given=arguments, decay=decay: reference.sgd(*given, 0.8, decay),
            "adamw": lambda given=arguments, decay=decay: reference.adamw(*given, decay),
            "lars": lambda given=arguments, decay=decay: reference.lars(
                *given, 0.8, decay, LARS_TRUST, adapt=decay > 0
            ),
        }[name]()[-1]
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=key)


def test_learning_rate_by_formula():
    total, warmup = 20, 4
    for step in range(total):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        expected = (step + 1) / 5 if step < warmup else cosine
        assert learning_rate(step, total_steps=total, warmup_steps=warmup) == pytest.approx(
            expected, abs=1e-15
        )
    rates = [learning_rate(step, total_steps=total, warmup_steps=warmup) for step in range(total + 2)]
    assert max(rates) == rates[warmup] == 1.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates[:total]) > 0
    assert rates[total:] == [0.0, 0.0]


def test_learning_rate_limits():
    assert learning_rate(0, total_steps=10, warmup_steps=0) == 1.0
    assert learning_rate(9, total_steps=10, warmup_steps=10) == 10 / 11  # all warm-up: no division by zero
    for step, total, warmup in ((-1, 10, 0), (0, 10, 11), (0, 10, -1)):
        with pytest.raises(ValueError, match="0 <= warmup_steps <= total_steps"):
            learning_rate(step, total_steps=total, warmup_steps=warmup)


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_equals_the_loops(adapt, momentum):
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=(3, 4)), generator.normal(size=(5, 3, 4))
    rates = [0.5, 0.4, 0.3, 0.2, 0.1]
    weight = nn.Parameter(torch.tensor(start))
    other = nn.Parameter(torch.tensor(2 * start[0]))  # another layer has a ratio of its own
    optimizer = LARS(
        [{"params": [weight, other], "adapt": adapt}],
        lr=1.0,
        momentum=momentum,
        weight_decay=0.05,
        trust=0.02,
    )
    expected = reference.lars(start, gradients, rates, momentum, 0.05, 0.02, adapt)
    for gradient, rate, want in zip(gradients, rates, expected, strict=True):
        weight.grad, other.grad = torch.tensor(gradient), torch.tensor(gradient[0])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), want, rtol=1e-12)
    alone = reference.lars(2 * start[0], gradients[:, 0], rates, momentum, 0.05, 0.02, adapt)
    np.testing.assert_allclose(other.detach().numpy(), alone[-1], rtol=1e-12)


@pytest.mark.parametrize(("start", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_lars_with_a_norm_of_zero(start, gradient):
    weight = nn.Parameter(torch.full((3,), start))
    weight.grad = torch.full((3,), gradient)
    LARS([weight], lr=0.1, momentum=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), start - 0.1 * gradient))


def test_lars_goes_on_from_its_state():
    gradients = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))

    def steps(weight, optimizer, rows):
        for gradient in rows:
            weight.grad = gradient.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(3, 2))
    steps(whole, LARS([whole], lr=0.1), gradients)
    first = nn.Parameter(torch.ones(3, 2))
    saved = LARS([first], lr=0.1)
    steps(first, saved, gradients[:2])
    second = nn.Parameter(first.detach().clone())
    resumed = LARS([second], lr=0.1)
    resumed.load_state_dict(saved.state_dict())
    steps(second, resumed, gradients[2:])
    assert torch.equal(whole, second)


def test_lars_leaves_parameters_without_gradient_alone():
    held, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    LARS([held, moved], lr=0.1).step()
    assert torch.equal(held.detach(), torch.ones(2))
    assert not torch.equal(moved.detach(), torch.ones(2))


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "trust": 0.0}])
def test_lars_ranges(settings):
    with pytest.raises(ValueError, match="lr > 0"):
        LARS([nn.Parameter(torch.ones(2))], **settings)

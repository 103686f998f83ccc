import os

import pytest
import timm
import torch
import torchvision

from contrastive.config import EncoderConfig
from contrastive.encoders.build import build_encoder
from tests.forked import run_forked


def build(name="resnet18", image_size=224, **settings):
    return build_encoder(EncoderConfig(name=name, **settings), image_size)


def images(b=2, side=64, seed=0):
    return torch.randn(b, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_names_and_shapes_are_torchvisions_and_timms(name):
    with torch.device("meta"):
        encoder, other = build(name), getattr(torchvision.models, name)()
        theirs = timm.create_model(name)
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    for model in (other, theirs):
        body = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert body.pop("fc.weight")[1] == encoder.dim
        assert body.pop("fc.bias")
        assert body == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_computes_the_same(name):
    encoder = build(name).eval()
    with torch.device("meta"):
        other = getattr(torchvision.models, name)().eval()
    other.fc = torch.nn.Identity()
    other.load_state_dict(encoder.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(encoder(images()), other(images()))


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_tokens_are_what_is_pooled(stem):
    encoder = build("resnet10", width=8, stem=stem).eval()
    with torch.no_grad():
        encoded = encoder.encode(images(side=32))
        pooled, tokens = encoded.pooled, encoded.tokens
        assert torch.equal(encoder(images(side=32)), pooled)
    side = 4 if stem == "small" else 1
    assert pooled.shape == (2, encoder.dim)
    assert tokens.shape == (2, side * side, encoder.dim)
    assert encoded.grid == (side, side)
    torch.testing.assert_close(tokens.mean(1), pooled)


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (64, 3), (65, 7), (224, 7)])
def test_the_stem_follows_the_image(side, kernel):
    assert build("resnet10", side, width=8).conv1.kernel_size == (kernel, kernel)


def test_the_small_stem_keeps_resolution():
    encoder = build("resnet10", 32, width=8)
    assert encoder.conv1.stride == (1, 1)
    assert isinstance(encoder.maxpool, torch.nn.Identity)
    assert not [name for name in encoder.state_dict() if name.startswith(("maxpool", "fc"))]


def test_width_scales_every_stage():
    encoder = build("resnet10", 32, width=16)
    stages = [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
    assert [len(stage) for stage in stages] == [1, 1, 1, 1]
    assert [stage[0].conv2.out_channels for stage in stages] == [16, 32, 64, 128]
    assert encoder.dim == 128
    assert encoder(images(side=32)).shape == (2, 128)


def test_a_narrow_network_trains_on_a_processor_without_avx512():
    """In a process of its own, which a write out of bounds would abort."""
    run_forked(train_narrow)


def train_narrow(number):
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read by the first convolution of a process
    encoder = build("resnet10", 16, width=4).to(memory_format=torch.channels_last)
    for _ in range(20):
        encoder(images(16, 16).to(memory_format=torch.channels_last)).square().mean().backward()


def test_a_narrow_network_computes_what_its_strides_say():
    torch.manual_seed(0)
    encoder = build("resnet10", 16, width=4).eval()
    with torch.no_grad():
        found = encoder(images(side=15))
        narrow = encoder.layer2[0].downsample[0]
        narrow._forward_pre_hooks.clear()
        narrow.stride = (2, 2)
        torch.testing.assert_close(found, encoder(images(side=15)))


def test_initial_weights_are_torchvisions():
    """Kaiming normal over fan-out; batch norm at 1 and 0, also the last of a block."""
    torch.manual_seed(0)
    encoder = build("resnet10")
    for weight in (encoder.conv1.weight, encoder.layer4[0].conv2.weight):
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert (encoder.layer1[0].bn2.weight == 1).all()
    assert (encoder.layer1[0].bn2.bias == 0).all()


def test_the_seed_decides_the_weights():
    torch.manual_seed(1)
    first = build("resnet10", width=8)
    torch.manual_seed(1)
    second = build("resnet10", width=8)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)

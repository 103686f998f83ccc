import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contrastive.batch_norm import SplitBatchNorm, convert, shuffled
from contrastive.config import EncoderConfig
from contrastive.data.batch import Batch
from contrastive.distributed import Rows
from contrastive.encoders.build import build_arch, build_encoder
from contrastive.encoders.spec import ArchSpec
from tests import tiny
from tests.contrastive.ranks import run_ranks


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_norm(shape):
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean += 0.5
    return norm


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 4), (11, 3), (3, 3), (2, 3)])
def test_each_group_is_normalised_as_on_a_device_of_its_own(shape):
    plain = plain_norm(shape)
    split = SplitBatchNorm(copy.deepcopy(plain), 4)
    groups = {12: [3, 3, 3, 3], 11: [3, 3, 3, 2], 3: [3], 2: [2]}[shape[0]]
    devices = [copy.deepcopy(plain) for _ in groups]
    given = rows(*shape).requires_grad_()
    expected_given = rows(*shape).requires_grad_()
    expected = torch.cat(
        [device(part) for device, part in zip(devices, expected_given.split(groups), strict=True)]
    )
    got = split(given)
    torch.testing.assert_close(got, expected)
    weigh = rows(*shape, seed=1)
    (got * weigh).sum().backward()
    (expected * weigh).sum().backward()
    torch.testing.assert_close(given.grad, expected_given.grad)
    torch.testing.assert_close(split.weight.grad, sum(device.weight.grad for device in devices))
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(device, name) for device in devices]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    assert split.num_batches_tracked == 1


def test_evaluation_and_state_are_those_of_plain_batch_norm():
    plain = plain_norm((12, 3, 4, 4))
    split = SplitBatchNorm(copy.deepcopy(plain), 4)
    split(rows(12, 3, 4, 4))
    plain.load_state_dict(split.state_dict())
    images = rows(5, 3, 4, 4, seed=2)
    assert torch.equal(split.eval()(images), plain.eval()(images))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("plain", {"BatchNorm2d"}),
        ("shuffle", {"BatchNorm2d"}),
        ("split", {"SplitBatchNorm"}),
        ("sync", {"SyncBatchNorm"}),
    ],
)
def test_convert_replaces_every_batch_norm_and_keeps_the_state(kind, names):
    encoder = build_encoder(EncoderConfig(name="resnet10", width=8), 16)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(8, 3, 16, 16)
    expected = copy.deepcopy(encoder).eval()(images)
    convert(encoder, kind, 2)
    kinds = [type(part).__name__ for part in encoder.modules() if "BatchNorm" in type(part).__name__]
    assert (set(kinds), len(kinds)) == (names, 12)
    assert list(before) == list(encoder.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(encoder.eval()(images), expected)


@pytest.mark.parametrize("kind", ["split", "sync"])
def test_a_batch_norm_with_an_activation_keeps_it(kind):
    """timm has such layers: what follows the normalisation must not be lost with the layer."""
    encoder, images = build_arch(ArchSpec("timm:test_efficientnet"), 32), torch.randn(4, 3, 32, 32)
    assert [part for part in encoder.modules() if type(part).__name__ == "BatchNormAct2d"]
    names, other = list(encoder.state_dict()), copy.deepcopy(encoder)
    convert(other, kind, 1)
    assert not [part for part in other.modules() if type(part).__name__ == "BatchNormAct2d"]
    assert list(other.state_dict()) == names
    assert torch.equal(other.eval()(images), encoder.eval()(images))
    if kind == "split":  # sync has no training on the CPU
        torch.testing.assert_close(other.train()(images), encoder.train()(images))


def test_the_order_is_a_pure_function_of_rows_seed_and_step():
    ids = torch.tensor([7, 1, 900, 4, 33, 12, 5, 6])
    order = shuffled(ids, 0, 3)
    assert sorted(order.tolist()) == list(range(8))
    assert torch.equal(order, shuffled(ids, 0, 3))
    others = [shuffled(ids, 1, 3), shuffled(ids, 0, 4), torch.arange(8)]
    assert not any(torch.equal(order, other) for other in others)
    # Each image meets each place about as often.
    places = torch.stack([shuffled(ids, 0, step).argsort() for step in range(4000)])
    assert torch.bincount(places[:, 2], minlength=8).sub(500).abs().max() < 100


def module_of(*overrides):
    """A module on 16 px images without a trainer, and 12 images."""
    module = tiny.module("data.global_batch=12", *overrides, fill=False)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    return module, images, torch.arange(20, 32)


def keys_in_groups(module, view, groups):
    """The keys of the groups, each through a key network of its own that has plain batch norms."""
    keys = torch.zeros(12, 8)
    for group in groups:
        encoder = build_encoder(module.config.encoder, 16)
        encoder.load_state_dict(module.networks.key_encoder.state_dict())
        head = copy.deepcopy(module.networks.key_projector)
        if module.config.encoder.batch_norm == "split":
            head[1] = nn.BatchNorm1d(16)
        head.load_state_dict(module.networks.key_projector.state_dict())
        keys[group] = F.normalize(head(encoder(view[group])), dim=1).detach()
    return keys


def test_split_keys_are_computed_in_groups_of_another_order():
    module, images, ids = module_of("encoder.batch_norm=split", "encoder.batch_norm_splits=3")
    view, _ = module.views(images, ids, 0)
    order = shuffled(ids, 0, 0)
    expected = keys_in_groups(module, view, order.split(4))
    plain = keys_in_groups(module, view, torch.arange(12).split(4))
    got = module.networks.keys(view, Rows(ids, ids, [12]), 0)
    torch.testing.assert_close(got, expected)
    assert (got - plain).abs().max() > 0.01


def two_ranks(rank):
    """Shuffled keys of 7 images on one rank and 5 on the other; steps in which one rank has one image."""
    module, images, ids = module_of("encoder.batch_norm=shuffle")
    view, _ = module.views(images, ids, 0)
    own = slice(0, 7) if rank == 0 else slice(7, 12)
    embed, met = module.networks.embed_key, []

    def watched(view):
        met.append(view.is_contiguous(memory_format=torch.channels_last))
        return embed(view)

    module.networks.embed_key = watched
    result = {"keys": module.networks.keys(view[own], Rows(ids[own], ids, [7, 5]), 0)}
    module.networks.keys(view[6 * rank :][:6], Rows(ids[6 * rank :][:6], ids, [6, 6]), 0)
    result["channels last"] = met
    for name in ("moco", "simclr"):
        module, images, ids = module_of("encoder.batch_norm=shuffle", f"method={name}")
        own = slice(0, 7) if rank == 0 else slice(7, 8)
        loss = module.training_step(Batch(images[own], ids[own]), 0)
        loss.backward()
        result[name] = loss.detach(), [weight.grad for weight in module.encoder.parameters()]
    return result


def test_keys_are_exchanged_between_ranks_and_come_back_in_place(tmp_path):
    ranks = run_ranks(two_ranks, tmp_path)
    module, images, ids = module_of("encoder.batch_norm=shuffle")
    view, _ = module.views(images, ids, 0)
    order = shuffled(ids, 0, 0)
    expected = keys_in_groups(module, view, [order[:7], order[7:]])
    torch.testing.assert_close(torch.cat([rank["keys"] for rank in ranks]), expected)
    assert [len(rank["keys"]) for rank in ranks] == [7, 5]
    # As the weights lie, with the padding of unequal ranks and without.
    assert all(rank["channels last"] == [True, True] for rank in ranks)
    for rank in ranks:  # all of them leave out a micro-batch of which one has a single image
        for name in ("moco", "simclr"):
            loss, gradients = rank[name]
            assert loss == 0
            assert all((gradient == 0).all() for gradient in gradients)

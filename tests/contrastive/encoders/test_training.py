"""Test depths for the learning rate, recomputed activations and the frozen patch projection."""

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay

from contrastive.config import EncoderConfig, OptimizerConfig, UserError
from contrastive.encoders import torchvision_model
from contrastive.encoders.build import build_arch
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.training import depths, freeze_patch_projection, recompute_activations
from contrastive.networks import Networks
from contrastive.optim import build_optimizer

VIT = {"embed_dim": 12, "depth": 3, "num_heads": 2}


def make(name, **args):
    torch.manual_seed(0)
    return build_arch(ArchSpec(name, args), 32)


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_convnext", "timm:test_resnet"])
def test_rates_by_depth_are_timms(name):
    """timm has no head here, so that its last block has the full rate; ours is behind the heads."""
    encoder, decay = make(name), 0.7
    theirs = {
        id(value): group["lr_scale"]
        for group in param_groups_layer_decay(encoder.network, layer_decay=decay)
        for value in group["params"]
    }
    network = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(2, 2)})
    by_name = {f"encoder.{key}": depth for key, depth in depths(encoder).items()}
    settings = OptimizerConfig(name="adamw", base_lr=0.5, layer_decay=decay)
    optimizer = build_optimizer(network, settings, 512, depths=by_name)
    ours = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for value in encoder.parameters():
        assert ours[id(value)] == pytest.approx(1.0 * decay * theirs[id(value)])
    assert [ours[id(value)] for value in network["head"].parameters()] == [1.0, 1.0]
    assert optimizer.param_groups[0]["lr"] == 1.0  # which is logged
    assert len({*ours.values()}) > 3


def test_blocks_of_a_residual_network_are_numbered_as_timm_does():
    theirs = timm.create_model("resnet18", num_classes=0)
    numbers = timm.models.group_parameters(theirs, theirs.group_matcher(), reverse=True)
    assert depths(make("resnet18", width=8)) == numbers


def test_a_hybrids_blocks_follow_those_of_its_cnn():
    found = depths(make("hybrid_resnet18", width=8, depth=2))
    names = ("cnn.conv1.weight", "cnn.bn1.bias", "cnn.layer1.0.conv1.weight", "cnn.layer3.1.bn2.weight")
    assert [found[name] for name in names] == [0, 0, 1, 6]
    assert [found[f"blocks.{number}.mlp.fc1.weight"] for number in (0, 1)] == [7, 8]
    assert found["norm.weight"] == 8


def test_layers_outside_of_blocks_belong_to_the_block_before():
    found = depths(make("torchvision:shufflenet_v2_x0_5"))
    names = (
        "conv1.0.weight",
        "conv1.1.bias",
        "stage2.0.branch1.0.weight",
        "stage4.3.branch2.0.weight",
        "conv5.1.bias",
    )
    assert [found[f"network.{name}"] for name in names] == [0, 0, 1, 4 + 8 + 4, 4 + 8 + 4]


def test_a_transformer_of_torchvision_is_numbered_by_its_blocks(monkeypatch):
    def create(model, image_size, args):
        network = torchvision.models.VisionTransformer(image_size, 8, 2, 2, 24, 24)
        network.heads = torch.nn.Identity()
        return network, "heads.head"

    monkeypatch.setattr(torchvision_model, "create", create)  # theirs begin at 86 million parameters
    found = depths(torchvision_model.build("vit_b_16", 32))
    names = ("class_token", "conv_proj.bias", "encoder.pos_embedding", "encoder.ln.weight")
    assert [found[f"network.{name}"] for name in names] == [0, 0, 0, 2]
    assert found["network.encoder.layers.encoder_layer_0.mlp.0.weight"] == 1


@pytest.mark.parametrize(
    ("name", "args"), [("vit_tiny", VIT | {"drop_path_rate": 0.5}), ("hybrid_resnet18", {"width": 8})]
)
def test_recomputed_activations_give_equal_gradients(name, args):
    images, calls = torch.randn(4, 3, 32, 32), []

    def gradients(recompute):
        encoder = make(name, **args)
        if recompute:
            recompute_activations(encoder)
        block = getattr(encoder, "network", encoder).blocks[0]
        block.register_forward_pre_hook(lambda *_: calls.append(recompute))
        torch.manual_seed(1)
        encoder(images).square().sum().backward()
        return {key: value.grad for key, value in encoder.named_parameters()}

    plain, again = gradients(False), gradients(True)
    assert (calls.count(False), calls.count(True)) == (1, 2)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, msg=key)


@pytest.mark.parametrize(
    ("name", "reason"), [("resnet10", "resnet10 has none"), ("timm:test_resnet", "has batch norms")]
)
def test_where_activations_are_not_recomputed_it_is_said(name, reason):
    with pytest.raises(UserError, match=rf"encoder\.grad_checkpointing: .*{reason}.*accumulate_grad_batches"):
        recompute_activations(make(name))


def test_the_patch_projection_alone_is_frozen():
    encoder = make("vit_tiny", **VIT)
    freeze_patch_projection(encoder)
    frozen = {key for key, value in encoder.named_parameters() if not value.requires_grad}
    assert frozen == {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}
    with pytest.raises(UserError, match=r"resnet10 has no patch projection; .*vit_small"):
        freeze_patch_projection(make("resnet10", width=8))


def test_the_average_of_a_network_without_batch_norm():
    networks = Networks(make("vit_tiny", **VIT), EncoderConfig(projector_hidden=8, projector_dim=4))
    networks.prepare(None)
    before = {key: value.clone() for key, value in networks.key_encoder.state_dict().items()}
    with torch.no_grad():
        for value in networks.encoder.parameters():
            value.add_(torch.randn_like(value))
    networks.follow(0.75)
    for key, value in networks.encoder.state_dict().items():
        expected = 0.75 * before[key].double() + 0.25 * value.double()
        torch.testing.assert_close(networks.key_encoder.state_dict()[key].double(), expected)

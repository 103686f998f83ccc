"""Test every encoder of the registry, with tiny arguments."""

import pytest
import timm
import torch
import torchvision

from contrastive.config import DataConfig, EncoderConfig, UserError
from contrastive.encoders import build, torchvision_model
from contrastive.encoders.build import build_arch, build_encoder
from contrastive.encoders.spec import ArchSpec, InputSpec
from contrastive.encoders.weights import load_encoder, load_weights, save_encoder
from contrastive.registry import ENCODERS, encoder_key

SIDE = 32
CASES = {
    "resnet10": ({"width": 8}, (32, 4, 4), 64),
    "resnet18": ({"width": 8}, (32, 4, 4), 64),
    "resnet34": ({"width": 8}, (32, 4, 4), 64),
    "resnet50": ({"stem": "imagenet"}, (32, 1, 1), 2048),
    "vit_tiny": ({"embed_dim": 24, "depth": 2, "num_heads": 3}, (32, 8, 8), 24),
    "vit_small": ({"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}, (32, 4, 4), 16),
    "vit_base": ({"embed_dim": 16, "depth": 2, "num_heads": 1, "init_values": 0.1}, (32, 8, 8), 16),
    "convnext_tiny": ({"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, (32, 4, 4), 32),
    "hybrid_resnet18": ({"width": 8, "depth": 2}, (32, 8, 8), 32),
    "cpu_resnet": ({"widths": [8, 16], "features": 24}, (32, 8, 8), 24),
    "r3d_10": ({"width": 8}, (32, 4, 4), 64),
    "timm:test_vit": ({"patch_size": 4}, (32, 8, 8), 64),
    "timm:test_vit2": ({"patch_size": 8}, (32, 4, 4), 64),
    "timm:test_resnet": ({"zero_init_last": False}, (32, 1, 1), 96),
    "timm:test_convnext": ({}, (32, 1, 1), 64),
    "timm:test_efficientnet": ({}, (32, 1, 1), 256),
    "torchvision:shufflenet_v2_x0_5": ({}, (32, 1, 1), 1024),
    "torchvision:mobilenet_v3_small": ({}, (32, 1, 1), 1024),
}
"""Name: arguments, (image size, rows, columns), size of the pooled features."""
CLASS_TOKENS = dict.fromkeys(("vit_tiny", "vit_small", "vit_base", "timm:test_vit"), 1)
TOKEN_WIDTH = {"torchvision:mobilenet_v3_small": 576}  # it has a layer behind the pooling


def make(name, seed=0):
    torch.manual_seed(seed)
    return build_arch(ArchSpec(name, CASES.get(name, ({},))[0]), SIDE)


def images(b=3):
    return torch.randn(b, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_every_entry_of_the_registry_has_a_case():
    assert {encoder_key(name) for name in CASES} == {*ENCODERS}, "add a line to CASES for the new encoder"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_encodes(name):
    _, (_, rows, columns), dim = CASES[name]
    encoder = make(name).eval()
    encoded = encoder.encode(images())
    assert encoder.dim == dim
    assert encoded.pooled.shape == (3, dim)
    assert encoded.grid == (rows, columns)
    expected = rows * columns + CLASS_TOKENS.get(name, 0)
    assert encoded.tokens.shape == (3, expected, TOKEN_WIDTH.get(name, dim))
    assert torch.equal(encoder(images()), encoded.pooled)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_is_saved_and_loaded(name, tmp_path):
    encoder, path = make(name), tmp_path / "encoder.safetensors"
    encoder(images())  # batch statistics leave their initial values
    save_encoder(path, encoder, InputSpec.of(DataConfig(image_size=SIDE)), {})
    loaded, info = load_encoder(path)
    assert info.arch == encoder.arch == loaded.arch
    assert torch.equal(loaded(images()), encoder.eval()(images()))
    other = make(name, seed=1).eval()
    assert not torch.equal(other(images()), encoder(images()))
    load_weights(other, str(path))
    assert torch.equal(other(images()), encoder(images()))


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_reaches_every_parameter(name):
    encoder = make(name)
    features = encoder(images())
    (features * torch.randn_like(features)).sum().backward()
    dead = [key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    # A key's bias shifts all logits of a query alike, and 1x1 maps leave the rim of a kernel without input.
    assert not [key for key in dead if "bias" not in key]
    assert all(value.grad is not None for value in encoder.parameters())


@pytest.mark.parametrize("name", CASES)
def test_equal_seeds_give_equal_weights(name):
    first, again = make(name).state_dict(), make(name).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@torch.no_grad()
def test_libraries_networks_keep_their_own_names_and_values():
    ours = make("timm:test_vit").eval()
    theirs = timm.create_model("test_vit", num_classes=0, img_size=SIDE, patch_size=4).eval()
    theirs.load_state_dict(ours.state_dict())
    features = theirs.forward_features(images())
    assert torch.equal(ours.encode(images()).tokens, features)
    assert torch.equal(ours(images()), theirs(images()))
    ours = make("torchvision:resnet18")
    names = {key for key in torchvision.models.resnet18().state_dict() if not key.startswith("fc.")}
    assert {*ours.state_dict()} == names


@torch.no_grad()
def test_registers_are_no_tokens():
    encoder = make("timm:test_vit2").eval()  # one register, no class token
    features = encoder.network.forward_features(images())
    assert torch.equal(encoder.encode(images()).tokens, features[:, 1:])


@torch.no_grad()
def test_the_last_feature_map_is_what_is_pooled():
    encoder = make("torchvision:resnet18").eval()
    encoded = encoder.encode(torch.randn(2, 3, 64, 96))
    assert encoded.grid == (2, 3)
    torch.testing.assert_close(encoded.tokens.mean(1), encoded.pooled)


@torch.no_grad()
def test_a_transformer_of_torchvision_has_a_class_token_before_its_patches(monkeypatch):
    def create(model, image_size, args):
        return torchvision.models.VisionTransformer(image_size, 8, 1, 2, 24, 24, num_classes=5), "heads.head"

    monkeypatch.setattr(torchvision_model, "create", create)  # theirs begin at 86 million parameters
    encoder = torchvision_model.build("vit_b_16", SIDE)
    encoder.network.heads.head = torch.nn.Identity()
    encoded = encoder.eval().encode(images())
    assert (encoded.tokens.shape, encoded.grid) == ((3, 17, 24), (4, 4))
    assert torch.equal(encoded.tokens[:, 0], encoded.pooled)
    assert torch.equal(encoder(images()), encoded.pooled)


def test_an_encoder_inside_a_module_keeps_its_names_in_checkpoints():
    body = torch.nn.ModuleDict({"before": torch.nn.Linear(1, 1), "encoder": make("timm:test_resnet")})
    tensors = body.state_dict()
    assert [*tensors][:3] == ["before.weight", "before.bias", "encoder.conv1.0.weight"]
    other = torch.nn.ModuleDict({"before": torch.nn.Linear(1, 1), "encoder": make("timm:test_resnet", 1)})
    other.load_state_dict(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "timm:test_vitt"}, "no classifier 'test_vitt'; did you mean test_vit"),
        ({"name": "timm:"}, "names no model"),
        ({"name": "torchvision:resnet19"}, "no classifier 'resnet19'; did you mean resnet1"),
        ({"name": "timm:hf-hub:timm/test_vit.r160_in1k"}, "has no classifier"),
        (
            {"name": "timm:test_vit", "args": {"patch_sise": 4}},
            "args.patch_sise: .*did you mean 'patch_size'",
        ),
        (
            {"name": "timm:test_vit", "args": {"patch_size": "a"}},
            "encoder.args={'patch_size': 'a'}: does not work",
        ),
        (
            {"name": "timm:test_vit", "args": {"img_size": 64, "dynamic_img_size": False}},
            r"img_size.*does not work for images of 32 px \(.*choose another data\.image_size",
        ),
        (
            {"name": "timm:test_efficientnet", "args": {"stem_size": -3}},
            r"encoder\.args={'stem_size': -3}: does not work .*change or leave out the argument",
        ),
        (
            {"name": "vit_tiny", "args": {"patch_size": 5}},
            r"no multiple of the patch's 5 px; choose .*30 or 35",
        ),
        ({"name": "vit_tiny", "args": {"positions": "rope"}}, "args.positions='rope': allowed are learned"),
        ({"name": "vit_tiny", "args": {"dept": 2}}, "args.dept: .*did you mean 'depth'"),
        (
            {"name": "vit_tiny", "args": {"positions": "sincos", "embed_dim": 6}},
            "positions.*divisible by 4",
        ),
        ({"name": "hybrid_resnet18", "args": {"heads": 3}}, "heads=3: the tokens have 256 channels"),
        ({"name": "hybrid_resnet18", "args": {"stages": 5}}, "args.stages=5: allowed is 1 to 4"),
        (
            {"name": "cpu_resnet", "args": {"widths": [8, 8], "blocks": [1]}},
            r"blocks=\[1\]: one number a stage",
        ),
        ({"name": "cpu_resnet", "args": {"widths": []}}, r"blocks=\[\]: one number a stage"),
        ({"name": "cpu_resnet", "args": {"widths": [8, 0]}}, "args.widths=0: allowed is 1 to"),
        ({"name": "cpu_resnet", "args": {"widths": 3}}, r"widths=3: a list of whole numbers is needed"),
        ({"name": "cpu_resnet", "args": {"widths": "32"}}, "widths='32': a list of whole numbers"),
        ({"name": "cpu_resnet", "args": {"blocks": 2}}, "blocks=2: a list of whole numbers"),
        ({"name": "cpu_resnet", "args": {"features": "x"}}, "features='x': a whole number is needed"),
        ({"name": "cpu_resnet", "args": {"features": 1.5}}, "features=1.5: a whole number is needed"),
        ({"name": "cpu_resnet", "args": {"grid": True}}, "grid=True: a whole number is needed"),
        ({"name": "cpu_resnet", "args": {"widths": [True]}}, r"widths=\[True\]: a list of whole numbers"),
        ({"name": "cpu_resnet", "args": {"features": 0}}, "features=0: allowed is 1 to"),
        ({"name": "cpu_resnet", "args": {"grid": 0}}, "grid=0: allowed is 1 to"),
        ({"name": "convnext_tiny", "args": {"patch_size": 64}}, "args.patch_size=64: allowed is 1 to 32"),
        ({"name": "timm:test_resnet", "args": {"global_pool": ""}}, "no vector for each image; leave"),
        ({"name": "timm:test_resnet", "args": {"pretrained": True}}, "args.pretrained: .*no such argument"),
        ({"name": "torchvision:resnet18", "args": {"weights": "x"}}, "args.weights: .*no such argument"),
        (
            {"name": "torchvision:googlenet", "args": {"aux_logits": True}},
            r"args.aux_logits: .*allowed are transform_input, blocks, dropout, dropout_aux$",
        ),
        (
            {"name": "torchvision:vit_b_16", "args": {"image_size": 64}},
            "args.image_size: .*allowed are patch_size",
        ),
        (
            {"name": "resnet18", "args": {"depth": 3}},
            "args.depth: .*no such argument; .*allowed are width, stem",
        ),
        ({"name": "resnet50", "width": 8}, "resnet50 comes at width 64 only"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig(**settings), SIDE)


def test_a_width_that_a_network_does_not_have_is_named(monkeypatch):
    lines = []
    monkeypatch.setattr(build.logger, "warning", lambda text, *values: lines.append(text % values))
    encoder = build.build_encoder(EncoderConfig(name="timm:test_resnet", width=16), SIDE)
    [line] = lines
    assert line.startswith(
        "encoder.width=16 (given, or the recipe's) is not used: encoder.name=timm:test_resnet"
    )
    assert encoder.arch.args == {}
    build.build_encoder(EncoderConfig(name="resnet10", width=16, stem="small"), SIDE)
    assert len(lines) == 1


def test_names_of_libraries_are_allowed_in_a_config():
    with pytest.raises(
        ValueError,
        match=r"encoder\.name='timmm:x': did you mean timm:MODEL\? allowed are resnet10, .*, torchvision",
    ):
        EncoderConfig(name="timmm:x")
    with pytest.raises(ValueError, match=r"encoder\.name='timm': .*allowed are"):
        EncoderConfig(name="timm")
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224': did you mean vit_tiny\? allowed are"):
        EncoderConfig(name="vit_tiny_patch16_224")


def test_published_weights_are_named(monkeypatch):
    theirs = timm.create_model("test_vit", num_classes=0, img_size=SIDE, patch_size=4)
    encoder = make("timm:test_vit")
    asked = {}

    def create(model, **options):
        asked.update(options, model=model)
        return theirs

    monkeypatch.setattr(timm, "create_model", create)
    load_weights(encoder, "default")
    assert asked == {
        "model": "test_vit",
        "num_classes": 0,
        "pretrained": True,
        "img_size": SIDE,
        "patch_size": 4,
    }
    assert torch.equal(encoder.state_dict()["cls_token"], theirs.cls_token)
    with pytest.raises(
        UserError, match=r"'default' are neither .* published weights are those of .*timm:MODEL"
    ):
        load_weights(make("resnet10"), "default")


@torch.no_grad()
def test_a_grid_keeps_the_places_of_things():
    """Each part of the grid is the mean of its part of the map, and the mean of all is the usual vector."""
    torch.manual_seed(0)
    grid = build_arch(ArchSpec("cpu_resnet", {"widths": [8, 16], "features": 24, "grid": 2}), SIDE).eval()
    whole = build_arch(ArchSpec("cpu_resnet", {"widths": [8, 16], "features": 24}), SIDE).eval()
    whole.load_state_dict(grid.state_dict())
    x = images()
    pooled = grid(x).unflatten(1, (24, 2, 2))
    assert (grid.dim, grid.arch.args["grid"], "grid" in whole.arch.args) == (96, 2, False)
    assert torch.allclose(pooled.mean((2, 3)), whole(x), atol=1e-6)
    corner = grid.encode(x).tokens.unflatten(1, (8, 8))[:, 4:, 4:].mean((1, 2))
    assert torch.allclose(pooled[:, :, 1, 1], corner, atol=1e-6)

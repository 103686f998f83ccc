"""Test the transformers' own names: patches by image size, fixed positions, weights of other sizes."""

import math

import pytest
import timm
import torch

from contrastive.config import UserError
from contrastive.encoders import timm_model
from contrastive.encoders.build import build_arch, without_memory
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.weights import load_weights

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3}


def make(name="vit_tiny", size=32, **args):
    torch.manual_seed(0)
    return build_arch(ArchSpec(name, TINY | args), size)


@pytest.mark.parametrize(
    ("size", "patch", "side"),
    [(16, 2, 8), (28, 2, 14), (32, 4, 8), (64, 8, 8), (96, 8, 12), (224, 16, 14), (384, 16, 24)],
)
def test_the_patch_follows_the_image_size(size, patch, side):
    encoder = without_memory(lambda: make(size=size))
    assert encoder.arch.args["patch_size"] == patch
    assert encoder.network.patch_embed.grid_size == (side, side)


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656)]
)
def test_at_the_usual_size_it_is_timms_network(name, parameters):
    """The numbers of parameters are those of DeiT's table 1 without the classifier."""
    ours = without_memory(lambda: build_arch(ArchSpec(name), 224))
    theirs = without_memory(lambda: timm.create_model(f"{name}_patch16_224", num_classes=0))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(value.numel() for value in ours.parameters()) == parameters


@pytest.mark.parametrize(("args", "first"), [({}, 1), ({"no_embed_class": True}, 0), ({"reg_tokens": 2}, 3)])
def test_fixed_positions_equal_the_formula_and_get_no_gradient(args, first):
    positions = make(positions="sincos", **args).network.pos_embed
    assert not positions.requires_grad
    assert not positions[0, :first].any()
    for patch in (0, 1, 8, 63):
        row, column = divmod(patch, 8)
        angles = [axis / 10000 ** (4 * number / 24) for number in range(6) for axis in (row, column)]
        expected = sorted([*map(math.sin, angles), *map(math.cos, angles)])
        found = sorted(positions[0, first + patch].tolist())
        assert found == pytest.approx(expected, abs=1e-6)
    assert len({tuple(each) for each in positions[0, first:].tolist()}) == 64


@torch.no_grad()
def test_other_sizes_are_accepted_as_local_views_are():
    encoder = make(size=32).eval()
    assert encoder.encode(torch.zeros(2, 3, 16, 16)).grid == (4, 4)


def test_a_file_of_moco_v3_is_read(tmp_path):
    """The projector lies where the classifier would."""
    theirs = make().state_dict()
    body = {f"module.base_encoder.{name}": value + 1 for name, value in theirs.items()}
    body |= {f"module.momentum_encoder.{name}": value for name, value in theirs.items()}
    body["module.base_encoder.head.0.weight"] = torch.zeros(2)
    torch.save({"epoch": 300, "state_dict": body}, tmp_path / "vit-s-300ep.pth.tar")
    encoder = make()
    load_weights(encoder, str(tmp_path / "vit-s-300ep.pth.tar"))
    assert all(torch.equal(value, theirs[name] + 1) for name, value in encoder.state_dict().items())


def test_a_file_of_another_transformer_names_it(tmp_path):
    outline = without_memory(lambda: build_arch(ArchSpec("vit_small"), 224)).state_dict()
    body = {f"module.{name}": torch.zeros(()).expand(value.shape) for name, value in outline.items()}
    torch.save(body, tmp_path / "vit.pth")
    message = (
        r"cls_token is \[1, 1, 384\], the network has \[1, 1, 24\] .*; the file is closest to "
        r"encoder\.name=vit_small; encoder\.name, .* data\.image_size too"
    )
    with pytest.raises(UserError, match=message):
        load_weights(make("vit_tiny"), str(tmp_path / "vit.pth"))


def test_published_weights_that_do_not_fit_say_what_differs(monkeypatch):
    encoder = build_arch(ArchSpec("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}), 32)

    def create(model, **options):
        published = {"stem.0.weight": torch.zeros(8, 3, 4, 4)}
        encoder.network.load_state_dict(published, strict=False)

    monkeypatch.setattr(timm_model.timm, "create_model", create)
    with pytest.raises(
        UserError, match=r"published weights do not fit data\.image_size and .*stem\.0\.weight"
    ):
        load_weights(encoder, "default")

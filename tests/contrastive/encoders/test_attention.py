"""Attention weights equal a softmax computed by loops in float64; maps are cut out at the right places."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from contrastive.config import UserError
from contrastive.encoders import torchvision_model
from contrastive.encoders.attention import (
    LAST_LAYER,
    ROLLOUT,
    SIMILARITY,
    attention_maps,
    encode_with_attention,
    rollout,
)
from contrastive.encoders.build import build_arch
from contrastive.encoders.encoder import Encoded, Encoder
from contrastive.encoders.spec import ArchSpec
from tests.reference import attention as reference

SIDE = 32
SMALL_SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


def make(name, **args):
    torch.manual_seed(0)
    return build_arch(ArchSpec(name, args), SIDE).eval()


def images(count=2, size=SIDE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs_of(modules, encoder):
    """Outputs of modules while the images are encoded, in float64."""
    seen = []
    hooks = [each.register_forward_hook(lambda _, inputs, output: seen.append(output)) for each in modules]
    encoder.encode(images())
    for hook in hooks:
        hook.remove()
    return [value.double().numpy() for value in seen]


def weights_by_loops(tokens, weight, bias, heads):
    """Weights of one block, from its input and the joint projection to queries, keys and values."""
    joint = tokens @ weight.double().numpy().T + bias.double().numpy()
    width = joint.shape[-1] // 3
    found = np.zeros((len(tokens), heads, tokens.shape[1], tokens.shape[1]))
    for image, rows in enumerate(joint):
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            query, key = rows[:, :width][:, part], rows[:, width : 2 * width][:, part]
            found[image, head] = reference.softmax_weights(query, key)
    return found


@torch.no_grad()
def test_weights_of_timm_equal_a_float64_softmax():
    encoder = make("timm:test_vit", patch_size=8)
    blocks = encoder.network.blocks
    encoded = encode_with_attention(encoder, images())
    assert len(encoded.attention) == len(blocks)
    tokens = outputs_of([block.norm1 for block in blocks], encoder)
    for found, block, x in zip(encoded.attention, blocks, tokens, strict=True):
        expected = weights_by_loops(x, block.attn.qkv.weight, block.attn.qkv.bias, block.attn.num_heads)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=0)
        assert expected.std() > 1e-3  # not the same for all tokens


@torch.no_grad()
def test_weights_of_torchvision_equal_a_float64_softmax(monkeypatch):
    encoder = torchvision_vit(monkeypatch)
    layers = encoder.network.encoder.layers
    encoded = encode_with_attention(encoder, images())
    assert len(encoded.attention) == len(layers) == 2
    tokens = outputs_of([layer.ln_1 for layer in layers], encoder)
    for found, layer, x in zip(encoded.attention, layers, tokens, strict=True):
        mixed = layer.self_attention
        expected = weights_by_loops(x, mixed.in_proj_weight, mixed.in_proj_bias, mixed.num_heads)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=0)
        assert expected.std() > 1e-3


def torchvision_vit(monkeypatch):
    """A small VisionTransformer of torchvision: theirs begin at 86 million parameters."""

    def create(model, image_size, args):
        network = torchvision.models.VisionTransformer(image_size, 8, 2, 3, 24, 24, num_classes=5)
        network.heads.head = nn.Identity()
        return network, "heads.head"

    torch.manual_seed(0)
    monkeypatch.setattr(torchvision_model, "create", create)
    return torchvision_model.build("vit_b_16", SIDE).eval()


@torch.no_grad()
def test_weights_with_rotated_positions_are_what_the_block_mixes_values_by():
    """Unfused, timm's own block computes the weights; a hook on their dropout sees them."""
    encoder = make("timm:eva02_tiny_patch14_224", patch_size=8, depth=2)
    found = encode_with_attention(encoder, images()).attention
    for block in encoder.network.blocks:
        block.attn.fused_attn = False
    seen = outputs_of([block.attn.attn_drop for block in encoder.network.blocks], encoder)
    for ours, theirs in zip(found, seen, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_features_are_those_of_encode_which_computes_no_attention(monkeypatch):
    ours = make("timm:test_vit", patch_size=8)
    for encoder, rounding in ((ours, 0), (torchvision_vit(monkeypatch), 1e-5)):
        plain, seen = encoder.encode(images()), encode_with_attention(encoder, images())
        assert plain.attention is None
        torch.testing.assert_close(seen.pooled, plain.pooled, rtol=0, atol=rounding)
        torch.testing.assert_close(seen.tokens, plain.tokens, rtol=0, atol=rounding)


def test_rollout_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(2, heads, 5, 5, generator=generator).softmax(-1) for heads in (3, 1, 4)]
    found = rollout(blocks)
    for image in range(2):
        expected = reference.rollout([block[image].numpy() for block in blocks])
        np.testing.assert_allclose(found[image].numpy(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 5))


@torch.no_grad()
def test_maps_are_the_class_tokens_row_without_registers():
    encoder = make("timm:test_vit", patch_size=8, reg_tokens=3)
    encoded = encode_with_attention(encoder, images())
    assert encoded.attention[0].shape[-2:] == (1 + 3 + 16, 1 + 3 + 16)
    found = attention_maps(encoded, "x")
    last = encoded.attention[-1].numpy()
    for image in range(2):
        row = reference.rollout([block[image].numpy() for block in encoded.attention])[0, 4:]
        expected = (row / row.mean()).reshape(4, 4)
        np.testing.assert_allclose(found.maps[ROLLOUT][image].numpy(), expected, atol=1e-5, rtol=0)
        for head in range(last.shape[1]):
            row = last[image, head, 0, 4:]
            expected = (row / row.mean()).reshape(4, 4)
            np.testing.assert_allclose(found.heads[image, head].numpy(), expected, atol=1e-5, rtol=0)
        row = last[image, :, 0, 4:].mean(0)
        expected = (row / row.mean()).reshape(4, 4)
        np.testing.assert_allclose(found.maps[LAST_LAYER][image].numpy(), expected, atol=1e-5, rtol=0)
    assert torch.equal(found.tokens.flatten(1, 2), encoded.tokens[:, 1:])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10", {"width": 8}),
        ("timm:test_convnext", {"output_stride": 8}),
        ("timm:test_vit2", {"patch_size": 8}),  # no class token
        ("timm:swin_tiny_patch4_window7_224", SMALL_SWIN),
    ],
    ids=["resnet", "convnext", "no class token", "swin"],
)
@torch.no_grad()
def test_without_a_class_token_that_attends_to_all_the_map_is_a_similarity(name, args):
    encoded = encode_with_attention(make(name, **args), images())
    found = attention_maps(encoded, name)
    assert (list(found.maps), found.heads) == ([SIMILARITY], None)
    rows, columns = encoded.grid
    for image, tokens in enumerate(encoded.tokens.double().numpy()):
        mean = tokens.mean(0)
        for place, token in enumerate(tokens):
            cosine = token @ mean / np.linalg.norm(token) / np.linalg.norm(mean)
            row, column = divmod(place, columns)
            assert float(found.maps[SIMILARITY][image, row, column]) == pytest.approx(cosine, abs=1e-5)
    assert rows * columns > 1


class Own(Encoder):
    """A Transformer of one's own: torch's layers, and the mean as class token."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.mix = nn.TransformerEncoder(layer, 3)

    def encode(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = self.mix(torch.cat([patches.mean(1, keepdim=True), patches], 1))
        return Encoded(tokens[:, 0], tokens, (4, 4))


@torch.no_grad()
def test_a_network_of_ones_own_needs_nothing_for_it():
    torch.manual_seed(0)
    found = encode_with_attention(Own().eval(), images())
    assert [weights.shape for weights in found.attention] == [(2, 2, 17, 17)] * 3
    assert [*attention_maps(found, "own").maps] == [ROLLOUT, LAST_LAYER]


class Windows(Own):
    """The same, after a block that attends within each row of patches."""

    def __init__(self):
        super().__init__()
        self.within = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def encode(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        patches = self.within(patches.reshape(-1, 4, 8)).reshape(len(x), 16, 8)
        tokens = self.mix(torch.cat([patches.mean(1, keepdim=True), patches], 1))
        return Encoded(tokens[:, 0], tokens, (4, 4))


@torch.no_grad()
def test_a_block_that_attends_to_windows_leaves_no_rollout():
    encoded = encode_with_attention(Windows().eval(), images())
    assert encoded.attention is None
    assert [*attention_maps(encoded, "own").maps] == [SIMILARITY]


@torch.no_grad()
def test_a_network_without_positions_is_refused():
    encoded = encode_with_attention(make("resnet10", width=8, stem="imagenet"), images())
    with pytest.raises(UserError, match=r"resnet10: .* single position .* larger data\.image_size"):
        attention_maps(encoded, "resnet10")
    with pytest.raises(UserError, match="branches: its tokens are no grid"):
        attention_maps(Encoded(torch.ones(1, 2), torch.ones(1, 1, 2), None), "branches")

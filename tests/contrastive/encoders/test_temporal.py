"""Encoders of clips: heads against loops in float64, what each can tell apart, files, weights, refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from contrastive.config import DataConfig, EncoderConfig, UserError
from contrastive.encoders import build
from contrastive.encoders.build import build_arch, build_encoder, check_encoder
from contrastive.encoders.foreign import load_foreign, parse_foreign
from contrastive.encoders.spec import ArchSpec, InputSpec
from contrastive.encoders.temporal_heads import Attention, Mean, Nuta
from contrastive.encoders.training import depths, freeze_patch_projection, recompute_activations
from contrastive.encoders.weights import load_encoder, load_weights, save_encoder
from tests.reference import temporal as reference

HEADS = {"mean": {}, "attention": {"dim": 16, "layers": 1, "heads": 2}, "nuta": {"dim": 16}}
T, SIDE = 6, 16


def make(temporal="nuta", seed=0, name="resnet10", **settings):
    torch.manual_seed(seed)
    config = EncoderConfig(name=name, width=8, temporal=temporal, temporal_args=HEADS[temporal], **settings)
    return build_encoder(config, SIDE, T).eval()


def clips(b=3, t=T):
    return torch.randn(b, t, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tensors(head):
    return {name: value.detach().double().numpy() for name, value in head.state_dict().items()}


@pytest.mark.parametrize("t", [1, 5, 6])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_head_is_what_the_loops_say(name, t):
    torch.manual_seed(0)
    head = {"mean": lambda: Mean(7), "attention": lambda: Attention(7, dim=8, heads=2)}.get(
        name, lambda: Nuta(7, dim=5)
    )()
    for weight in head.parameters():
        weight.add_(torch.randn_like(weight) / 2)  # attention far from uniform
    frames = torch.randn(2, t, 7)
    pooled, weights = head.double()(frames.double())
    for row, clip in enumerate(frames.double().numpy()):
        wanted = {
            "mean": lambda clip=clip: reference.mean(clip),
            "attention": lambda clip=clip: reference.attention(tensors(head), clip, 2, 2),
            "nuta": lambda clip=clip: reference.nuta(tensors(head), clip),
        }[name]()
        torch.testing.assert_close(pooled[row], torch.tensor(wanted[0], dtype=torch.float64))
        torch.testing.assert_close(weights[row], torch.tensor(wanted[1], dtype=torch.float64))
    assert t == 1 or name == "mean" or weights.std() > 0.02


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_only_mean_is_blind_to_the_order_of_the_frames(name):
    encoder, batch = make(name), clips()
    forward, backward = encoder(batch), encoder(batch.flip(1))
    assert torch.allclose(forward, backward, atol=1e-5) == (name == "mean")
    encoded = encoder.encode(batch)
    assert torch.equal(encoded.pooled, forward)
    assert encoded.pooled.shape == (3, encoder.dim)
    assert encoded.frame_weights.shape == (3, T)
    torch.testing.assert_close(encoded.frame_weights.sum(1), torch.ones(3))
    torch.testing.assert_close(encoded.tokens[1], encoder.image(batch[1]))


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_its_file_and_its_description_rebuild_it(name, tmp_path):
    encoder, path = make(name), tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, InputSpec.of(DataConfig(image_size=SIDE, frames=T)), {})
    loaded, info = load_encoder(path)
    assert info.arch == encoder.arch == loaded.arch
    assert (info.arch.temporal, info.arch.temporal_args, info.input.frames) == (name, HEADS[name], T)
    assert str(info.arch).startswith(f"resnet10, width 8, stem small, under {name}")
    assert torch.equal(loaded(clips()), encoder(clips()))
    other = make(name, seed=1)
    assert not torch.equal(other(clips()), encoder(clips()))
    load_weights(other, str(path))
    assert torch.equal(other(clips()), encoder(clips()))


def test_the_description_of_images_is_that_of_before():
    spec = ArchSpec("resnet10", {"width": 8})
    assert json.loads(spec.to_json()) == {"name": "resnet10", "args": {"width": 8}}
    with pytest.raises(ValueError, match="a name and a mapping"):
        ArchSpec.from_json('{"name": "resnet10", "args": {}, "temporal": 3}')


@torch.no_grad()
def test_weights_of_images_go_into_the_part_that_encodes_frames(tmp_path):
    path = tmp_path / "encoder.safetensors"
    image = build_encoder(EncoderConfig(name="resnet10", width=8), SIDE).eval()
    save_encoder(path, image, InputSpec.of(DataConfig(image_size=SIDE)), {})
    encoder = make("nuta")
    before = {name: value.clone() for name, value in encoder.over_time.state_dict().items()}
    load_weights(encoder, str(path))
    assert torch.equal(encoder.image(clips()[0]), image(clips()[0]))
    assert all(torch.equal(value, before[name]) for name, value in encoder.over_time.state_dict().items())
    save_encoder(path, encoder, InputSpec.of(DataConfig(image_size=SIDE, frames=T)), {})
    with pytest.raises(UserError, match=r"over_time\.token is missing"):
        load_weights(make("attention"), str(path))


@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_reaches_every_parameter(name):
    encoder = make(name).train()
    features = encoder(clips())
    (features * torch.randn_like(features)).sum().backward()
    dead = [key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    assert not dead


def test_depth_checkpointing_and_patch_projection_are_of_the_image_encoder():
    torch.manual_seed(0)
    args = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    config = EncoderConfig(name="vit_tiny", args=args, temporal="nuta", temporal_args={"dim": 8})
    encoder = build_encoder(config, SIDE, T)
    found = depths(encoder)
    assert found.keys() == {name for name, _ in encoder.named_parameters()}
    last = max(depth for name, depth in found.items() if name.startswith("image."))
    assert {depth for name, depth in found.items() if name.startswith("over_time.")} == {last + 1}
    recompute_activations(encoder)
    freeze_patch_projection(encoder)
    assert not encoder.image.network.patch_embed.proj.weight.requires_grad


@torch.no_grad()
def test_networks_of_clips_see_time_and_images_as_one_frame():
    encoder = build_encoder(EncoderConfig(name="r3d_10", width=8), SIDE, T).eval()
    encoded = encoder.encode(clips(t=9))
    assert (encoded.pooled.shape, encoded.tokens.shape, encoded.grid) == ((3, 64), (3, 2 * 4, 64), None)
    torch.testing.assert_close(encoded.tokens.mean(1), encoded.pooled)
    assert not torch.allclose(encoded.pooled, encoder(clips(t=9).flip(1)), atol=1e-4)
    assert torch.equal(encoder(clips()[:, 0]), encoder(clips()[:, :1]))
    assert encoder.encode(clips()[:, 0]).grid == (2, 2)
    wide = build_arch(ArchSpec("r3d_10", {"stem": "imagenet"}), 64, T).state_dict()
    theirs = torchvision.models.video.r3d_18().state_dict()
    assert all(theirs[name].shape == value.shape for name, value in wide.items())


class _Video(nn.Module):
    """The smallest network in the shape of torchvision's of clips."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv3d(3, 4, 3, stride=2, padding=1)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(4, 7, 1))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x))).mean((2, 3, 4))


@torch.no_grad()
def test_a_network_of_clips_of_torchvision_is_used_without_its_classifier(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **_: _Video())  # theirs are large
    encoder = build_arch(ArchSpec("torchvision:s3d"), SIDE, T).eval()
    assert (encoder.dim, encoder.classifier_names[0], encoder.takes_clips) == (4, "classifier.1", True)
    encoded = encoder.encode(clips())
    assert encoded.tokens.shape == (3, 3 * 8 * 8, 4)
    torch.testing.assert_close(encoded.tokens.mean(1), encoded.pooled)
    expected = encoder.network.features(clips().transpose(1, 2)).mean((2, 3, 4))
    torch.testing.assert_close(encoder(clips()), expected)
    assert "KINETICS400_V1" in encoder.weight_names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "frames", "dim"),
    [("r2plus1d_18", 16, 4, 512), ("r3d_18", 16, 4, 512)],
)
def test_networks_of_torchvision_encode_clips(name, size, frames, dim):
    encoder = build_arch(ArchSpec(f"torchvision:{name}"), size, frames)
    check_encoder(encoder, size, frames=frames)
    assert encoder.dim == dim
    names = {*getattr(torchvision.models.video, name)().state_dict()} - {"fc.weight", "fc.bias"}
    assert {*encoder.state_dict()} == names


def test_a_network_of_images_of_a_library_is_averaged_over_the_frames():
    foreign = parse_foreign("torchvision:mobilenet_v3_small:random")
    torch.manual_seed(0)
    encoder, spec = load_foreign(foreign, SIDE, frames=T)
    assert (spec.frames, spec.size, encoder.arch.temporal) == (T, SIDE, "mean")
    torch.manual_seed(0)
    image, spec = load_foreign(foreign, SIDE)
    assert spec.frames == 1
    with torch.no_grad():
        expected = torch.stack([image(clip).mean(0) for clip in clips()])
        torch.testing.assert_close(encoder(clips()), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal": "nuta", "temporal_args": {"layers": 2}}, r"temporal_args\.layers: .*allowed are dim"),
        ({"temporal_args": {"dim": 2}}, r"temporal_args\.dim: encoder\.temporal=mean .*it has none"),
        ({"temporal": "attention", "temporal_args": {"heads": 3}}, "heads=3: the width 64 is no multiple"),
        ({"temporal": "attention", "temporal_args": {"dim": "a"}}, "temporal_args={'dim': 'a'}"),
        ({"temporal": "attention", "temporal_args": {"layers": 0}}, "layers=0: allowed is 1 to 64"),
        ({"temporal": "nuta", "temporal_args": {"dim": -1}}, "dim=-1: allowed is 1 to"),
        ({"name": "r3d_10", "args": {"frames": 4}}, r"args\.frames: .*no such argument"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig(**{"name": "resnet10", "width": 8} | settings), SIDE, T)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"encoder\.temporal='median': allowed are mean, attention, nuta"):
        EncoderConfig(temporal="median")


def test_a_head_that_is_not_used_is_named_and_one_for_images_refused(monkeypatch):
    lines = []
    monkeypatch.setattr(build.logger, "warning", lambda text, *values: lines.append(text % values))
    config = EncoderConfig(name="r3d_10", width=8, temporal="nuta")
    assert build_encoder(config, SIDE, T).arch.temporal == ""
    assert lines == ["encoder.temporal=nuta is not used: encoder.name=r3d_10 takes clips itself"]
    with pytest.raises(UserError, match=r"encoder.temporal=nuta joins .* data.frames=1 trains on images"):
        build_encoder(EncoderConfig(name="resnet10", width=8, temporal="nuta"), SIDE)


def signal_in_a_third(n, seed, third=None, everywhere=False, dim=8, t=9):
    """Features of noise; one of two patterns, which is the label, is added in a third that is drawn or given.

    Returns:
        Frames, labels, and the third of each clip.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    patterns = 2 * torch.randn(2, dim, generator=torch.Generator().manual_seed(7))
    frames = torch.randn(n, t, dim, generator=generator)
    thirds = torch.randint(0, 3, (n,), generator=generator) if third is None else torch.full((n,), third)
    there = (torch.arange(t) // 3 == thirds[:, None]) | everywhere
    return frames + there[..., None] * patterns[labels][:, None], labels, thirds


def train_head(head, frames, labels):
    """Train a head and a classifier on its features; return the classifier."""
    classifier = nn.Linear(head.dim, 2)
    optimizer = torch.optim.AdamW([*head.parameters(), *classifier.parameters()], lr=3e-3)
    for step in range(150):
        batch = torch.arange(64 * step, 64 * step + 64) % len(frames)
        loss = F.cross_entropy(classifier(head(frames[batch])[0]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


@torch.no_grad()
def weight_of_each_third(head, frames):
    return head(frames)[1].unflatten(1, (3, 3)).sum(2)


@pytest.mark.parametrize("name", ["attention", "nuta"])
def test_weights_over_time_peak_where_one_part_tells(name):
    torch.manual_seed(0)
    head = {"attention": lambda: Attention(8, dim=16, heads=2), "nuta": lambda: Nuta(8, dim=16)}[name]()
    frames, labels, _ = signal_in_a_third(512, 0, third=2)
    test, test_labels, _ = signal_in_a_third(256, 1, third=2)
    assert 0.25 < weight_of_each_third(head, test)[:, 2].mean() < 0.42  # random weights: about a third
    classifier = train_head(head, frames, labels)
    with torch.no_grad():
        assert (classifier(head(test)[0]).argmax(1) == test_labels).float().mean() > 0.95
    assert weight_of_each_third(head, test)[:, 2].mean() >= 0.5


def test_weights_of_nuta_follow_the_third_that_tells_and_are_even_where_all_do():
    torch.manual_seed(0)
    head = Nuta(8, dim=16)
    frames, labels, _ = signal_in_a_third(512, 0)
    test, _, thirds = signal_in_a_third(256, 1)
    alike, _, _ = signal_in_a_third(256, 2, everywhere=True)
    before = weight_of_each_third(head, test)
    train_head(head, frames, labels)
    after, uniform = weight_of_each_third(head, test), weight_of_each_third(head, alike)
    for third in range(3):
        assert 0.25 < before[thirds == third, third].mean() < 0.42
        assert after[thirds == third, third].mean() >= 0.5
        assert 0.23 < uniform[:, third].mean() < 0.43

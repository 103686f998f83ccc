import urllib.error

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from contrastive.config import DataConfig, EncoderConfig, UserError
from contrastive.encoders.build import build_encoder
from contrastive.encoders.foreign import load_foreign, parse_foreign
from contrastive.encoders.library import download
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import save_encoder


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(text, images, image_size=None):
    module, fed = load_foreign(parse_foreign(text), image_size)
    assert not module.training
    return module(images), fed


def test_weights_that_cannot_be_downloaded_can_be_done_without():
    """A recipe may state them, so it is not enough to leave them out."""

    def fetch():
        raise OSError("no route to host")

    with pytest.raises(UserError, match=r"downloaded \(no route to host\).*\(encoder.weights=null\)"):
        download("torchvision:resnet18", fetch)


@torch.no_grad()
def test_torchvision_weights_of_a_file(tmp_path, images):
    """The classifier's own number of classes does not matter; features are what it would get."""
    other = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(other.state_dict(), tmp_path / "w.pth")
    found, _ = features(f"torchvision:resnet18:{tmp_path / 'w.pth'}", images)
    other.fc = torch.nn.Identity()
    assert torch.equal(found, other(images))


@torch.no_grad()
def test_timm_weights_of_a_file_at_another_size(tmp_path, images):
    other = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(other.state_dict(), path)
    found, fed = features(f"timm:vit_tiny_patch16_224:{path}", images, 32)
    torch.testing.assert_close(found, other.forward_head(other.forward_features(images), pre_logits=True))
    assert (fed.size, fed.decode_size, fed.mean) == (32, 32, [0.5, 0.5, 0.5])


def test_our_own_encoder_goes_into_torchvisions_network(tmp_path, images):
    config = EncoderConfig(name="resnet18", stem="imagenet")
    encoder = build_encoder(config, 32).eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, InputSpec.of(DataConfig()), {})
    found, _ = features(f"torchvision:resnet18:{tmp_path / 'encoder.safetensors'}", images)
    with torch.no_grad():
        torch.testing.assert_close(found, encoder(images))


def test_images_are_fed_as_the_library_says(images):
    """Stored and cropped at the sizes of torchvision's own preset; at another size by our rule."""
    _, fed = features("torchvision:resnet18:random", images)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert [fed.size] == preset.crop_size
    assert [fed.decode_size] == preset.resize_size
    assert (fed.mean, fed.std) == (preset.mean, preset.std)
    _, other = features("torchvision:resnet18:random", images, 96)
    assert (other.size, other.decode_size) == (96, 110)


def test_random_weights_come_from_the_global_generator(images):
    def made(seed):
        torch.manual_seed(seed)
        return features("torchvision:resnet18:random", images)[0]

    first, again, other = made(0), made(0), made(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_names_of_weights_are_fetched_without_pickle(images, monkeypatch):
    from torchvision.models import _api

    asked = {}

    def fetch(url, **options):
        asked.update(options, url=url)
        return torchvision.models.resnet50().state_dict()

    monkeypatch.setattr(_api, "load_state_dict_from_url", fetch)
    _, fed = features("torchvision:resnet50:IMAGENET1K_V2", images)
    assert asked["weights_only"]
    assert asked["check_hash"]
    assert asked["url"] == torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url
    assert fed.decode_size == 232


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision::random", "names no model; write torchvision:resnet18"),
        ("torchvision:resnt18:random", "no classifier 'resnt18'; did you mean resnet18"),
        ("torchvision:fcn_resnet50:random", "no classifier 'fcn_resnet50'"),
        ("torchvision:squeezenet1_0:random", "ends in no linear layer"),
        ("torchvision:resnet18:V9", "neither a name nor a file; allowed are default, IMAGENET1K_V1, a file"),
        ("timm:resnt18:random", "no classifier 'resnt18'; did you mean"),
        ("timm:resnet18:V9", "neither a name nor a file; allowed are default, a file"),
        ("torchvision:resnet18:~nosuchuser/w", "the home folder of ~nosuchuser is not known"),
        (
            "torchvision:resnet34:FILE",
            "layer1.2.conv1.weight is missing; the file is closest to encoder.name=resnet18; MODEL in",
        ),
    ],
)
def test_what_cannot_be_had(text, message, tmp_path, images):
    if "FILE" in text:
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        features(text.replace("FILE", str(tmp_path / "w.pth")), images)
    assert message in str(caught.value)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_names_with_a_prefix_are_taken(library, tmp_path, images):
    body = timm.create_model("resnet18").state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in body.items()}}, tmp_path / "w.ckpt")
    torch.save(body, tmp_path / "w.pth")
    wrapped, _ = features(f"{library}:resnet18:{tmp_path / 'w.ckpt'}", images)
    plain, _ = features(f"{library}:resnet18:{tmp_path / 'w.pth'}", images)
    assert torch.equal(wrapped, plain)


def test_weights_that_are_not_finite_are_refused(tmp_path, images):
    body = torchvision.models.resnet18().state_dict()
    body["bn1.bias"][0] = float("nan")
    torch.save(body, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: bn1\.bias holds numbers that are not finite"):
        features(f"torchvision:resnet18:{tmp_path / 'w.pth'}", images)


def test_a_transformer_is_built_for_the_size_of_the_images(images):
    found, fed = features("torchvision:vit_b_16:random", images, 32)
    assert (found.shape, fed.size) == ((2, 768), 32)


@pytest.mark.parametrize(("model", "size"), [("vit_b_16", 30), ("alexnet", 32)])
def test_a_size_that_a_network_does_not_take_is_named(model, size, images):
    with pytest.raises(
        UserError, match=f"{model}: does not take images of {size} px .*leave data.image_size"
    ):
        features(f"torchvision:{model}:random", images, size)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_without_a_network_the_message_says_what_else_to_give(library, images, monkeypatch):
    from torchvision.models import _api

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    create = timm.create_model
    monkeypatch.setattr(_api, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: refuse() if k.get("pretrained") else create(*a, **k)
    )
    with pytest.raises(UserError, match=rf"no route to host.*{library}:resnet18:FILE or {library}:.*random"):
        features(f"{library}:resnet18", images)

import json
import logging
import os

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision

from contrastive.config import DataConfig, EncoderConfig, UserError
from contrastive.encoders.build import build_encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import load_encoder, load_weights, save_encoder
from memory_bank import sealed


def configs(name="resnet18", image_size=64, **settings):
    return EncoderConfig(name=name, **settings), DataConfig(image_size=image_size)


def make(name="resnet10", image_size=64, **settings):
    """An encoder whose batch-norm statistics are not the initial ones, and its configs."""
    torch.manual_seed(0)
    config, data = configs(name, image_size, **settings)
    encoder = build_encoder(config, image_size)
    encoder(torch.randn(4, 3, 32, 32))
    return encoder.eval(), config, data


def save(path, encoder, config, data, **extra):
    save_encoder(path, encoder, InputSpec.of(data), extra)
    return path


def fresh(name="resnet10", image_size=64, **settings):
    return build_encoder(configs(name, image_size, **settings)[0], image_size).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model, images):
    return model.eval()(images)


def test_there_and_back(tmp_path, images):
    encoder, config, data = make("resnet10", 32, width=16)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data, step="12")
    loaded, info = load_encoder(str(path))
    assert not loaded.training
    assert torch.equal(outputs(loaded, images), outputs(encoder, images))
    assert (info.arch.name, info.arch.args) == ("resnet10", {"width": 16, "stem": "small"})
    assert (info.input.size, info.input.decode_size, info.input.frames) == (32, 32, 1)
    assert (info.input.mean, info.input.std) == (data.mean, data.std)
    assert info.extra == {"step": "12"}


def test_an_encoder_file_says_how_many_frames_it_takes():
    data = DataConfig(image_size=32, frames=8)
    spec = InputSpec.of(data)
    assert spec.frames == 8
    assert InputSpec.from_json(spec.to_json()) == spec
    assert spec.at(64).frames == 8


def test_an_encoder_file_says_which_value_is_white():
    spec = InputSpec.of(DataConfig(image_size=96, white=4095))
    assert spec.data.white == 4095
    assert InputSpec.from_json(spec.to_json()) == spec
    assert spec.at(64) == InputSpec.of(DataConfig(image_size=64, white=4095))


def test_the_stem_is_written_as_built_not_as_auto(tmp_path):
    encoder, config, data = make("resnet10", 96, width=8)
    _, info = load_encoder(save(tmp_path / "encoder.safetensors", encoder, config, data))
    assert (info.arch.args["stem"], info.input.size, info.input.decode_size) == ("imagenet", 96, 110)


def test_metadata_are_strings_that_other_tools_can_read(tmp_path):
    encoder, config, data = make("resnet10", 32, width=16)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert len(metadata.pop("seal")) == 64
        assert metadata == {
            "format": "contrastive-encoder",
            "format_version": "3",
            "arch": '{"name": "resnet10", "args": {"width": 16, "stem": "small"}}',
            "input": '{"size": 32, "decode_size": 32, "mean": [0.485, 0.456, 0.406], '
            '"std": [0.229, 0.224, 0.225], "frames": 1}',
        }


OLD = {
    "format": "contrastive-encoder",
    "name": "resnet10",
    "width": "16",
    "stem": "small",
    "image_size": "96",
    "decode_size": "110",
    "mean": "[0.485, 0.456, 0.406]",
    "std": "[0.229, 0.224, 0.225]",
    "step": "12",
}
"""Metadata as releases of format versions 1 and 2 wrote them."""


@pytest.mark.parametrize("version", ["1", "2"])
def test_files_of_old_releases_load(version, tmp_path, images):
    encoder, _, data = make("resnet10", 32, width=16)
    path, metadata = tmp_path / "encoder.safetensors", OLD | {"format_version": version}
    if version == "1":
        safetensors.torch.save_file(encoder.state_dict(), path, metadata)
    else:
        sealed.write(path, encoder.state_dict(), metadata)
    loaded, info = load_encoder(path)
    assert torch.equal(outputs(loaded, images), outputs(encoder, images))
    assert (info.arch, info.arch.args) == (encoder.arch, {"width": 16, "stem": "small"})
    assert (info.input.size, info.input.decode_size, info.input.mean) == (96, 110, data.mean)
    assert info.extra == {"step": "12"}


def test_loading_leaves_the_global_generator_alone(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    before = torch.get_rng_state()
    load_encoder(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_torchvision_and_timm_load_it(tmp_path, images):
    encoder, config, data = make("resnet18", stem="imagenet")
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    expected = outputs(encoder, images)

    other = torchvision.models.resnet18()
    report = other.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    other.fc = torch.nn.Identity()
    assert torch.equal(outputs(other, images), expected)

    theirs = timm.create_model("resnet18", checkpoint_path=str(path), num_classes=0)
    torch.testing.assert_close(outputs(theirs, images), expected)


@pytest.mark.parametrize(("source", "suffix"), [("torchvision", ".pth"), ("timm", ".safetensors")])
def test_their_weights_load_here(source, suffix, tmp_path, images):
    other = torchvision.models.resnet18() if source == "torchvision" else timm.create_model("resnet18")
    path = tmp_path / f"weights{suffix}"
    write = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    write(other.state_dict(), path)
    encoder = fresh("resnet18", stem="imagenet")
    load_weights(encoder, str(path))
    other.fc = torch.nn.Identity()
    torch.testing.assert_close(outputs(encoder, images), outputs(other, images))


def test_a_wrapped_state_dict_and_one_without_counters(tmp_path, images):
    encoder, _, _ = make(width=8)
    body = {name: v for name, v in encoder.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": body, "epoch": 3}, tmp_path / "weights.tar")
    other = fresh(width=8)
    load_weights(other, str(tmp_path / "weights.tar"))
    assert torch.equal(outputs(other, images), outputs(encoder, images))


def test_half_precision_weights_are_widened(tmp_path):
    encoder, _, _ = make("resnet10", width=8)
    torch.save(
        {name: v.half() if v.is_floating_point() else v for name, v in encoder.state_dict().items()},
        tmp_path / "w.pth",
    )
    other = fresh("resnet10", width=8)
    load_weights(other, str(tmp_path / "w.pth"))
    assert other.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(other.conv1.weight, encoder.conv1.weight, rtol=1e-3, atol=1e-4)


def test_an_encoder_file_in_half_precision_is_widened(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    tensors, metadata = sealed.read(path)
    sealed.write(
        path, {name: v.half() if v.is_floating_point() else v for name, v in tensors.items()}, metadata
    )
    loaded, _ = load_encoder(path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.conv1.weight, encoder.conv1.weight, rtol=1e-3, atol=1e-4)


def test_other_stem_names_the_remedy(tmp_path):
    big, config, data = make("resnet10", width=8, stem="imagenet")
    path = save(tmp_path / "big.safetensors", big, config, data)
    with pytest.raises(UserError, match=r"kernel is 3x3; set encoder\.stem=imagenet"):
        load_weights(fresh("resnet10", width=8, stem="small"), str(path))
    small, config, data = make("resnet10", width=8, stem="small")
    path = save(tmp_path / "small.safetensors", small, config, data)
    with pytest.raises(UserError, match=r"kernel is 7x7; set encoder\.stem=small"):
        load_weights(fresh("resnet10", width=8, stem="imagenet"), str(path))


def altered(change):
    encoder, _, _ = make("resnet10", width=8)
    body = dict(encoder.state_dict())
    change(body)
    return body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("layer2.0.conv1.weight"), r"layer2\.0\.conv1\.weight is missing"),
        (lambda body: body.update(extra=torch.zeros(1)), "extra is not in the network"),
        (
            lambda body: body.update({"bn1.weight": torch.zeros(9)}),
            r"bn1\.weight is \[9\], the network has \[8\]",
        ),
        (lambda body: body.pop("conv1.weight"), r"conv1\.weight is missing"),
        (
            lambda body: body.update({"conv1.weight": torch.zeros(8, 3, 5, 5)}),
            r"conv1\.weight is \[8, 3, 5, 5\], the network has .*; a 7x7 or 3x3 kernel is needed",
        ),
        (lambda body: body.update({"conv1.weight": torch.zeros(8)}), r"conv1\.weight is \[8\], the network"),
        (dict.clear, r"conv1\.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message, tmp_path):
    safetensors.torch.save_file(altered(change), tmp_path / "w.safetensors")
    encoder = fresh("resnet10", width=8)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(encoder, str(tmp_path / "w.safetensors"))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"conv1.weight": Malicious(str(marker))}, tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.pth").read_bytes())
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_weights(fresh("resnet10", width=8), str(tmp_path / name))
    with pytest.raises(UserError, match=r"w\.safetensors"):
        load_encoder(tmp_path / "w.safetensors")
    assert not marker.exists()


def test_the_environment_cannot_ask_for_an_unsafe_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    torch.save({"conv1.weight": Malicious(str(marker))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a file of tensors"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / "w.pth"))
    assert not marker.exists()


@pytest.mark.parametrize("body", [[1, 2], {"conv1.weight": 3}, {"state_dict": {"a": "b"}}, torch.zeros(2)])
def test_a_file_of_other_things(body, tmp_path):
    torch.save(body, tmp_path / "w.pth")
    with pytest.raises(UserError, match="a state dict is needed"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"PK\x03\x04" + bytes(30), b"\x80\x02."])
def test_a_broken_pth(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth: not a file of tensors"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth", "missing"])
def test_a_missing_file(name, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / name))


def test_another_suffix(tmp_path):
    (tmp_path / "w.npz").touch()
    with pytest.raises(UserError, match=r"allowed are files in \.safetensors, \.pth.*, \.ckpt"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / "w.npz"))


def below(prefix, body):
    return {prefix + name: value for name, value in body.items()}


def other(body):
    """The same names with other numbers, as a momentum copy has them."""
    return {name: torch.zeros_like(value) for name, value in body.items()}


@pytest.fixture
def said():
    """Lines of the log, which does not propagate once a command line has run."""
    logger, lines = logging.getLogger("contrastive.encoders.weights"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


WRAPPED = {
    "module.": lambda body: below("module.", body),
    "backbone.": lambda body: below("backbone.", body) | below("projector.", {"0.weight": torch.zeros(2)}),
    "_orig_mod.": lambda body: below("_orig_mod.", body),
    "model.": lambda body: {"model": body, "epoch": 3, "optimizer": {"state": {0: {"momentum": body}}}},
    "state_dict.backbone.": lambda body: {"state_dict": below("backbone.", body), "epoch": 3},
    "state_dict.module.base_encoder.": lambda body: {"state_dict": below("module.base_encoder.", body)},
    "state_dict.module.encoder_q.": lambda body: {
        "state_dict": below("module.encoder_q.", body | {"fc.0.weight": torch.zeros(2)})
        | below("module.encoder_k.", other(body))
        | {"module.queue": torch.zeros(2)}
    },
    "state_dict.": lambda body: {"state_dict": body, "state_dict_ema": other(body)},
    "teacher.backbone.": lambda body: {
        "student": below("module.backbone.", other(body)),
        "teacher": below("backbone.", body) | below("head.", {"mlp.weight": torch.zeros(2)}),
    },
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_names_with_one_prefix_are_loaded_and_the_prefix_is_said(prefix, suffix, tmp_path, said):
    encoder, _, _ = make("resnet10", width=8)
    torch.save(WRAPPED[prefix](dict(encoder.state_dict())), tmp_path / f"w{suffix}")
    loaded = fresh("resnet10", width=8)
    load_weights(loaded, str(tmp_path / f"w{suffix}"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    (line,) = said
    assert f"took the tensors below {prefix!r}" in line


def test_nothing_is_said_of_names_without_a_prefix(tmp_path, said):
    encoder, _, _ = make("resnet10", width=8)
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    load_weights(fresh("resnet10", width=8), str(tmp_path / "w.pt"))
    assert said == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: below("a.", body) | below("b.", body), r"below each of a\., b\. fit; save one of them"),
        (lambda body: below("net.0.", {"x.weight": torch.zeros(1)}), r"all names begin with net\.0\.x"),
        (lambda body: {"model": {"x": torch.zeros(1)}, "ema": {"y": torch.zeros(1)}}, "it holds model, ema"),
        (lambda body: {"model": 1, "epoch": 3}, r"a state dict is needed.*it holds model, epoch"),
        (
            lambda body: below("module.", {k: v for k, v in body.items() if k != "bn1.bias"}),
            r"bn1\.bias is missing \(below 'module\.'\); encoder\.name",
        ),
        (
            lambda body: below("module.", body | {"extra": torch.zeros(1)}),
            r"extra is not in the network \(below 'module\.'\)",
        ),
    ],
)
def test_names_that_no_single_prefix_makes_fit_are_named(change, message, tmp_path):
    torch.save(change(dict(fresh("resnet10", width=8).state_dict())), tmp_path / "w.pth")
    encoder = fresh("resnet10", width=8)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(encoder, str(tmp_path / "w.pth"))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var"])
def test_numbers_that_are_not_finite_name_the_file_and_the_tensor(number, name, tmp_path):
    body = {key: value.clone() for key, value in fresh("resnet10", width=8).state_dict().items()}
    body[name].view(-1)[0] = number
    torch.save(below("module.", body), tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w\.pth: module\.{name} holds numbers that are not finite"):
        load_weights(fresh("resnet10", width=8), str(tmp_path / "w.pth"))


def test_a_file_saved_again_by_another_tool_says_what_to_do(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata | {"note": "saved again"})
    with pytest.raises(UserError, match=r"saved again by another tool; take the original file"):
        load_encoder(path)


def arch(name, **args):
    return json.dumps({"name": name, "args": args})


def fed(**changed):
    fields = {"size": 32, "decode_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "frames": 1}
    return json.dumps(fields | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "pt"}, "not an encoder of contrastive-pretrain .format='pt'"),
        ({"format_version": "4"}, "format version 4, this release reads up to 3; upgrade"),
        ({"format_version": "one"}, "damaged metadata"),
        ({"arch": None}, r"damaged metadata \('arch'"),
        ({"arch": "{"}, "damaged metadata"),
        ({"arch": "[]"}, "damaged metadata .*an object of name, args is needed"),
        ({"arch": '{"name": "resnet10"}'}, "damaged metadata .*an object of name, args is needed"),
        ({"arch": '{"name": 1, "args": {}}'}, "damaged metadata"),
        (
            {"arch": arch("vit_of_tomorrow")},
            r"network 'vit_of_tomorrow' that this release does not have; upgr",
        ),
        ({"arch": arch("resnet18:a")}, "that this release does not have"),
        ({"arch": arch("resnet10", width=-1)}, r"damaged metadata .*width=-1: allowed is 1 to"),
        ({"arch": arch("resnet10", width="8")}, "damaged metadata"),
        ({"arch": arch("resnet10", width=16)}, r"the network has \[16"),
        (
            {"arch": arch("resnet10", width=8, depth=3)},
            "args.depth: encoder.name=resnet10 has no such argument",
        ),
        ({"arch": arch("resnet10", width=8, stem="imagenet")}, r"set encoder\.stem=small"),
        ({"arch": arch("resnet10", width=8, stem="tall")}, "damaged metadata"),
        ({"arch": arch("timm:hf-hub:some/one")}, "damaged metadata .*no classifier 'hf-hub:some/one'"),
        ({"arch": arch("timm:test_vit", checkpoint_path="x")}, "damaged metadata .*args.checkpoint_path"),
        ({"input": "{}"}, "damaged metadata"),
        ({"input": fed(mean=[0.5])}, "damaged metadata .*three numbers"),
        ({"input": fed(std=["a", "b", "c"])}, "damaged metadata"),
        ({"input": fed(size=1)}, "damaged metadata"),
        ({"input": fed(size=32.5)}, "damaged metadata"),
        ({"input": fed(frames=0)}, "damaged metadata .*data.frames=0"),
    ],
)
def test_damaged_metadata(changed, message, tmp_path):
    refuse(changed, message, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "vgg"}, "network 'vgg' that this release does not have"),
        ({"width": "-1"}, "damaged metadata"),
        ({"width": "16"}, r"the network has \[16"),
        ({"stem": "imagenet"}, r"set encoder\.stem=small"),
        ({"stem": "tall"}, "damaged metadata"),
        ({"mean": "[0.5]"}, "damaged metadata"),
        ({"mean": "{"}, "damaged metadata"),
        ({"std": '["a", "b", "c"]'}, "damaged metadata"),
        ({"image_size": None}, r"damaged metadata \('image_size'"),
    ],
)
def test_damaged_metadata_of_old_releases(changed, message, tmp_path):
    old = OLD | {"format_version": "2", "width": "8", "arch": None, "input": None}
    refuse(old | changed, message, tmp_path)


def refuse(changed, message, tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    tensors, metadata = sealed.read(path)
    metadata = {name: value for name, value in (metadata | changed).items() if value is not None}
    sealed.write(path, tensors, metadata)
    with pytest.raises(UserError, match=message):
        load_encoder(path)


def test_another_tool_may_save_it_anew_as_version_1_only(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "seal"}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"damaged metadata \(no seal\)"):
        load_encoder(path)
    safetensors.torch.save_file(tensors, path, metadata | {"format_version": "1"})
    assert torch.equal(load_encoder(path)[0].conv1.weight, encoder.conv1.weight)


def test_a_width_from_a_file_cannot_ask_for_a_huge_network(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    path = save(tmp_path / "encoder.safetensors", encoder, config, data)
    tensors, metadata = sealed.read(path)
    for width, message in ((65536, r"the network has \[65536"), (65537, "damaged metadata")):
        sealed.write(path, tensors, metadata | {"arch": arch("resnet10", width=width, stem="small")})
        with pytest.raises(UserError, match=message):
            load_encoder(path)


def test_extra_metadata_cannot_replace_ours(tmp_path):
    encoder, config, data = make("resnet10", 32, width=8)
    with pytest.raises(ValueError, match=r"extra=\['arch'\]: these names are taken"):
        save(tmp_path / "encoder.safetensors", encoder, config, data, arch="3")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to("meta"), torch.Tensor.bool])
def test_tensors_that_are_not_dense_real_numbers_are_refused(change, tmp_path):
    tensors = fresh().state_dict()
    tensors["conv1.weight"] = change(tensors["conv1.weight"])
    torch.save(tensors, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"conv1.weight is a .* dense real numbers are needed"):
        load_weights(fresh(), str(tmp_path / "odd.pt"))

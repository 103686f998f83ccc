"""Export state dicts for torchvision and timm, with the Python code that loads them."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from contrastive.config import UserError
from contrastive.encoders import torchvision_model
from contrastive.encoders.library import LibraryEncoder
from contrastive.encoders.resnet import ResNetEncoder
from contrastive.encoders.torchvision_model import TorchvisionEncoder
from contrastive.export.config import ExportConfig
from contrastive.export.source import ExportedEncoder
from memory_bank import sealed
from memory_bank.replacing import write_file


def write_torchvision(config: ExportConfig, source: ExportedEncoder, out: Path) -> dict[str, Any]:
    """Write a state dict with torchvision's names, without the classifier."""
    _check_library(source, "torchvision")
    name, encoder = source.arch.name, source.encoder
    model: Any
    if isinstance(encoder, TorchvisionEncoder):
        model, head = torchvision_model.create(*encoder.made_of)
        call = _call(encoder.made_of[0], torchvision_model.arguments(*encoder.made_of))
        lines = [
            f"model = torchvision.models.get_model({call})",
            f'model.set_submodule("{head}", torch.nn.Identity())',
        ]
    else:
        if name == "resnet10":
            model = ResNet(BasicBlock, [1, 1, 1, 1])
            make = "model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])"
        else:
            model = getattr(torchvision.models, name)()
            make = f"model = torchvision.models.{name}()"
        model.fc = nn.Identity()
        lines = [make, "model.fc = torch.nn.Identity()", *_small_stem(source, model)]
    return _write(source, out, model, ["import torch", "import torchvision", "", *lines])


def write_timm(config: ExportConfig, source: ExportedEncoder, out: Path) -> dict[str, Any]:
    """Write a state dict with timm's names, which are torchvision's for residual networks."""
    _check_library(source, "timm")
    import timm  # takes seconds

    from contrastive.encoders import timm_model

    name, encoder = source.arch.name, source.encoder
    if isinstance(encoder, timm_model.TimmEncoder):
        model = timm_model.create(*encoder.made_of)
        call = _call(encoder.made_of[0], timm_model.arguments(*encoder.made_of))
        lines = [f"model = timm.create_model({call}, num_classes=0)"]
    else:
        if name == "resnet10":
            block: Any = timm.models.resnet.BasicBlock
            model = timm.models.ResNet(block, (1, 1, 1, 1), num_classes=0)
            make = "model = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)"
        else:
            model = timm.create_model(name, num_classes=0)
            make = f'model = timm.create_model("{name}", num_classes=0)'
        lines = [make, *_small_stem(source, model)]
    return _write(source, out, model, ["import timm", "import torch", "", *lines])


def _call(model: str, given: dict[str, Any]) -> str:
    """Return the arguments of a library's function as Python code."""
    return ", ".join([f'"{model}"', *(f"{name}={value!r}" for name, value in given.items())])


def _check_library(source: ExportedEncoder, library: str) -> None:
    """Refuse networks that the library does not have."""
    encoder, arch = source.encoder, source.arch
    made_by = encoder.name.partition(":")[0] if isinstance(encoder, LibraryEncoder) else ""
    if made_by == library:
        return
    use = f"use {f'format={made_by}, ' if made_by else ''}format=onnx, or in Python load_encoder"
    other = f'{use}("{source.file}") of contrastive.encoders.weights'
    if not isinstance(encoder, ResNetEncoder):
        raise UserError(f"{source.file}: is a {arch}, which {library} does not have; {other}")
    if (width := arch.args["width"]) != 64:
        raise UserError(
            f"{source.file}: is a {arch.name} of width {width}, torchvision and timm have width 64 only; "
            f"{other}"
        )


def _small_stem(source: ExportedEncoder, model: Any) -> list[str]:
    """Give the library's network the stem for small images, if the encoder has it; return the code for it."""
    if source.arch.args["stem"] != "small":
        return []
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return [
        "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images",
        "model.maxpool = torch.nn.Identity()",
    ]


def _write(source: ExportedEncoder, out: Path, model: Any, lines: list[str]) -> dict[str, Any]:
    """Verify that the library's network computes the same features, then write its weights.

    Args:
        source: The encoder.
        out: Output file.
        model: The library's network.
        lines: Python code that builds it.
    """
    model.load_state_dict(source.encoder.state_dict())
    model.eval()
    difference = source.compare(lambda pixels: model(_ordered(source, source.normalize(pixels))))
    _save(source, out, model)
    return {"max_difference": difference, "load": [*lines, *_load(out)]}


def _ordered(source: ExportedEncoder, x: Tensor) -> Tensor:
    """Return clips as torchvision's networks take them: (b, 3, t, h, w); images as they are."""
    return x.transpose(1, 2) if source.encoder.takes_clips else x


def _save(source: ExportedEncoder, out: Path, model: nn.Module) -> None:
    weights = dict(model.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        sealed.write(out, weights, {"format": "pt", "source_sha256": source.sha256})
    else:
        write_file(out, lambda file: torch.save(weights, file))


def _load(out: Path) -> list[str]:
    if out.suffix == ".safetensors":
        read = ["from safetensors.torch import load_file", "", f"weights = load_file({out.name!r})"]
    else:
        read = [f"weights = torch.load({out.name!r}, weights_only=True)"]
    return [*read, "model.load_state_dict(weights)", "model.eval()"]

"""State dicts for torchvision and timm, and the lines of Python that load them."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from contrastive.config import UserError
from contrastive.export.config import ExportConfig
from contrastive.export.source import Source
from eval.results import write_file
from memory_bank import sealed


def write_torchvision(config: ExportConfig, source: Source, out: Path) -> dict[str, Any]:
    """Torchvision's names, less ``fc.*``."""
    _check_width(source)
    name = source.meta.encoder.name
    model = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else getattr(torchvision.models, name)()
    model.fc = nn.Identity()
    if name == "resnet10":
        make = "model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])"
    else:
        make = f"model = torchvision.models.{name}()"
    lines = ["import torch", "import torchvision", "", make, "model.fc = torch.nn.Identity()"]
    return _write(source, out, model, lines)


def write_timm(config: ExportConfig, source: Source, out: Path) -> dict[str, Any]:
    """timm's names, which are torchvision's for these networks."""
    _check_width(source)
    if importlib.util.find_spec("timm") is None:
        raise UserError("format=timm: timm is not installed; run pip install 'contrastive-pretrain[timm]'")
    timm = importlib.import_module("timm")
    name = source.meta.encoder.name
    if name == "resnet10":
        model = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)
        make = "model = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)"
    else:
        model = timm.create_model(name, num_classes=0)
        make = f'model = timm.create_model("{name}", num_classes=0)'
    return _write(source, out, model, ["import timm", "import torch", "", make])


def _check_width(source: Source) -> None:
    meta = source.meta.encoder
    if meta.width != 64:
        raise UserError(
            f"{source.file}: is a {meta.name} of width {meta.width}, torchvision and timm have width 64 only;"
            " use format=onnx, or contrastive.encoders.weights.load_encoder in Python"
        )


def _write(source: Source, out: Path, model: Any, lines: list[str]) -> dict[str, Any]:
    """Prove that the other library's network computes the same, then write its weights.

    Args:
        source: The encoder.
        out: The file.
        model: The other library's network, but for the stem.
        lines: Python that makes it.
    """
    if source.meta.encoder.stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        lines = [
            *lines,
            "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images",
            "model.maxpool = torch.nn.Identity()",
        ]
    model.load_state_dict(source.encoder.state_dict())
    model.eval()
    difference = source.compare(lambda pixels: model(source.normalize(pixels)))
    _save(source, out, model)
    return {"max_difference": difference, "load": [*lines, *_load(out)]}


def _save(source: Source, out: Path, model: nn.Module) -> None:
    weights = dict(model.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        sealed.write(out, weights, {"format": "pt", "source_sha256": source.sha256})
    else:
        write_file(out, lambda file: torch.save(weights, file))


def _load(out: Path) -> list[str]:
    if out.suffix == ".safetensors":
        read = ["from safetensors.torch import load_file", "", f'weights = load_file("{out.name}")']
    else:
        read = [f'weights = torch.load("{out.name}", weights_only=True)']
    return [*read, "model.load_state_dict(weights)", "model.eval()"]

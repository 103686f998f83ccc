"""Every kind of encoder in the registry from pretraining to its exported files."""

import json

import pytest
import torch

from contrastive.encoders.build import build_arch
from contrastive.encoders.weights import load_encoder, load_weights
from contrastive.export.__main__ import main as export
from contrastive.registry import ENCODERS
from eval.__main__ import main as evaluate
from tests.contrastive.encoders.test_registry import CASES, SIDE
from tests.contrastive.pretrain.runs import bank, metrics, same, weights

SETTINGS = {
    "vit_tiny": ["encoder.args.drop_path_rate=0.5", "encoder.grad_checkpointing=true"],
    "vit_small": ["encoder.args.positions=sincos", "encoder.freeze_patch_projection=true"],
    "convnext_tiny": ["encoder.args.drop_path_rate=0.5", "optimizer.layer_decay=0.8"],
    "hybrid_resnet18": ["encoder.args.drop_path_rate=0.5", "encoder.grad_checkpointing=true"],
}
FORMATS = {
    "vit": "timm",
    "convnext": "timm",
    "timm": "timm",
    "torchvision": "torchvision",
}
"""Formats of the networks that a library has; narrow residual networks and hybrids are in none."""


BUILDERS = {place: name for name, place in reversed(ENCODERS.items()) if not name.endswith(":")}
NAMES = sorted({*BUILDERS.values(), *SETTINGS, "timm:test_vit", "torchvision:shufflenet_v2_x0_5"})
"""The first network of each builder, and those with settings of their own; test_registry.py has all."""


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_from_pretraining_to_exported_files(name, run, tmp_path, capsys):
    given = [f"encoder.name={name}", f"encoder.args={json.dumps(CASES[name][0])}", *SETTINGS.get(name, [])]
    given = [f"data.image_size={SIDE}", "optimizer.name=adamw", *given]
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    for folder, steps, every in ((whole, 4, 4), (parts, 2, 2), (parts, 4, 2)):
        place = [f"run.name={folder.name}", f"run.checkpoint_every={every}"]
        code, _, err = run(*given, *place, f"trainer.max_steps={steps}")
        assert code == 0, err
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))
    assert [row["train/loss"] for row in metrics(whole)] == [row["train/loss"] for row in metrics(parts)]
    early, late = weights(parts / "checkpoints/step-2"), weights(parts)
    still = {key for key in late if torch.equal(early[key], late[key])}
    assert {key for key in still if "patch_embed" in key or "pos_embed" in key} == still
    assert bool(still) == (name == "vit_small")

    few = ["linear.min_steps=5", "linear.epochs=1"]
    assert evaluate(["linear", f"checkpoint={whole}", "device=cpu", "progress=false", *few]) == 0
    assert 0 <= last_line(capsys)["scores"]["top1"]["encoder"] <= 1

    trained, info = load_encoder(whole / "encoder.safetensors")
    form = next((FORMATS[key] for key in FORMATS if name.startswith(key)), None)
    file = tmp_path / "exported.pth"
    code = export([f"checkpoint={whole}", f"format={form or 'torchvision'}", f"out={file}"])
    assert (code, file.is_file()) == ((0, True) if form else (2, False))
    other = build_arch(info.arch, SIDE).eval()
    load_weights(other, str(file if form else whole / "encoder.safetensors"))
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(other(images), trained(images))

    assert export([f"checkpoint={whole}", "format=onnx", f"out={tmp_path / 'e.onnx'}"]) == 0
    assert last_line(capsys)["max_difference"] < 1e-5

"""Check on a GPU what a CPU cannot: recipes in bfloat16 and compiled, NCCL, synchronised batch norm.

    python benchmarks/gpu_checks.py smoke RECIPE [--device cuda] [--data DIR] [--tiny]
    python benchmarks/gpu_checks.py nccl

``smoke`` takes 20 steps of a shipped recipe, compiled and in bfloat16, and the first of them again in
float32, on the GPU and on the CPU: the same weights, images, views and bank, so the losses differ by rounding
alone. The bank is filled with random keys first, so that negatives are mined from the first step. Only what
one device without a network cannot do or repeat is changed: batch norm over devices, downloaded weights and
drop path.

``nccl`` sends tensors through every collective of a run with one rank, which returns them unchanged if
nothing is wrong, and compares synchronised with plain batch norm. On a CPU it checks gloo's collectives.

The last line of stdout is the result as JSON; benchmarks/gpu_table.py runs all of this.
"""

import argparse
import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import QUIET, make_files
from torch import Tensor, nn

from contrastive.batch_norm import convert
from contrastive.choosing.choose import choose
from contrastive.config import EncoderConfig, PretrainConfig
from contrastive.config_files import load_config, read_stated
from contrastive.distributed import Collectives, all_true, gather_rows, gather_with_grad
from contrastive.dry_run import StepTimer
from contrastive.logging.metrics_csv import read_metrics
from contrastive.module import ContrastiveModule
from contrastive.pretrain import pretrain

STEPS, TINY_STEPS = 20, 3
LARGE = 96  # px; sets of larger images seldom fit on the device, so they are decoded in every epoch
FILES_A_BATCH = 8
"""Random images made for each image of a batch, if no data is given."""

TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 4 * torch.finfo(torch.bfloat16).eps}
"""Allowed error of a similarity: a loss may differ by this over the temperature, in nats.

In bfloat16 an untrained ResNet-50 on 32 images of 32 px was off by half of that, the other recipes by less.
"""

TINY = (
    "data.image_size=32",
    "data.global_batch=32",
    "data.num_workers=0",
    "encoder.batch_norm_splits=2",
    "encoder.projector_hidden=16",
    "mining.num_hard=4",
    "mining.num_uniform=4",
)


class FillBank(pl.Callback):
    """Fill the bank with random keys, the same on every device, until it is mined."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveModule)
        rows, dim = pl_module.plan.rows, pl_module.config.encoder.projector_dim
        ids = torch.arange(rows, device=pl_module.device)
        generator = torch.Generator().manual_seed(0)
        while not pl_module.miner.ready():  # a queue may hold more keys than there are rows
            keys = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
            pl_module.miner.write(keys.to(pl_module.device), ids, 0)


def one_device(encoder: EncoderConfig) -> list[str]:
    """Return overrides for one device without a network, and without random numbers that differ by device."""
    overrides = ["encoder.weights=null"]
    if encoder.batch_norm == "shuffle":
        overrides.append("encoder.batch_norm=split")
    if "drop_path_rate" in encoder.args:
        overrides.append("encoder.args.drop_path_rate=0")
    if getattr(encoder, "freeze_epochs", 0):  # or the encoder's gradient would not be checked
        overrides.append("encoder.freeze_epochs=0")
    return overrides


def settings(recipe: str, data: Path, runs: Path, *overrides: str) -> PretrainConfig:
    """Return a shipped recipe on one device, with a row of metrics for each step and no monitors."""
    fixed = [
        f"run.root={runs}",
        "data.name=imagefolder",
        f"data.root={data}",
        "schedule.minutes=null",
        "trainer.devices=1",
        "logging.every_n_steps=1",
        *QUIET,
    ]
    shipped = load_config(PretrainConfig, "pretrain", recipe, fixed)
    fixed += one_device(shipped.encoder)
    if shipped.data.image_size > LARGE:
        fixed.append("data.resident=false")
    stated = read_stated(PretrainConfig, "pretrain", recipe, [*fixed, *overrides])
    return choose(stated) if stated["choose"] else stated.config()


def train(config: PretrainConfig, *callbacks: pl.Callback) -> tuple[list[float], dict[str, Any]]:
    """Train in exactly the given precision; return the loss of every step, and the summary."""
    code, summary = pretrain(config, keep_precision=True, callbacks=[FillBank(), *callbacks])
    if code or summary is None:
        raise SystemExit(f"the run ended with exit code {code}")
    return read_metrics(Path(summary["run"]) / "metrics.csv")["train/loss"], summary


def smoke(recipe: str, data: Path, runs: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Train a few steps of ``recipe`` on ``device`` and one on the CPU; return losses, speed and memory."""
    more, steps = (TINY, TINY_STEPS) if tiny else ((), STEPS)
    on_gpu = device == "cuda"
    ours = settings(
        recipe,
        data,
        runs,
        *more,
        "run.name=device",
        f"run.compile={str(on_gpu).lower()}",
        f"trainer.max_steps={steps}",
        f"trainer.accelerator={'gpu' if on_gpu else 'cpu'}",
        "trainer.precision=bf16-mixed",
    )
    once = {"max_steps": 1, "precision": "32-true"}
    exact = replace(ours, run=replace(ours.run, name="float32", compile="false"), trainer=ours.trainer | once)
    cpu = replace(exact, run=replace(exact.run, name="cpu"), trainer=exact.trainer | {"accelerator": "cpu"})
    timer = StepTimer(math.inf)
    losses, summary = train(ours, timer)
    (float32,), _ = train(exact)
    (reference,), _ = train(cpu)
    return {
        "recipe": recipe,
        "steps": len(losses),
        "losses": losses,
        "float32_loss": float32,
        "cpu_loss": reference,
        "finite": all(map(math.isfinite, losses)),
        "equal": is_equal(losses[0], reference, ours) and is_equal(float32, reference, exact),
        "images_per_s": ours.data.global_batch / timer.typical,
        "peak_memory_mib": summary["peak_memory_mib"],
    }


def is_equal(loss: float, reference: float, config: PretrainConfig) -> bool:
    """Return whether a run of ``config`` has the reference's loss, up to the rounding of its precision."""
    return abs(loss - reference) <= TOLERANCE[config.trainer["precision"]] / config.objective.temperature


class Lone(int):
    """A number of ranks, 1, that compares as more, so that no shortcut of a single process is taken."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True


def collectives(device: torch.device) -> dict[str, bool]:
    """Return which collectives of a run give one rank's tensors back unchanged."""
    rows = torch.randn(5, 3, device=device, requires_grad=True)
    weight = torch.randn(5, 3, device=device)
    (gradient,) = torch.autograd.grad((gather_with_grad(rows) * weight).sum(), rows)
    flags, host = torch.tensor([True, False], device=device), torch.arange(6).view(3, 2)
    exchange = Collectives()
    found = {
        "gather_rows": torch.equal(gather_rows(rows), rows),
        "gather_rows of booleans": torch.equal(gather_rows(flags), flags),
        "gather_rows of none": gather_rows(rows[:0]).shape == (0, 3),
        "gather_with_grad": torch.equal(gradient, weight),
        "all_true": torch.equal(all_true(flags), flags),
        "gather of host memory": torch.equal(exchange.gather(host)[0], host),
        "swap of host memory": torch.equal(exchange.swap([host])[0], host),
        "swap of float16": torch.equal(exchange.swap([weight.half()])[0], weight.half()),
        "total of host memory": torch.equal(exchange.total(host), host),
    }
    return {name: bool(right) for name, right in found.items()}


def sync_batch_norm_error(device: torch.device) -> float:
    """Return the largest difference between synchronised and plain batch norm, also in gradients."""
    found = [normalise(kind, device) for kind in ("plain", "sync")]
    return max(float((plain - sync).abs().max()) for plain, sync in zip(*found, strict=True))


def normalise(kind: str, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    images, weight = torch.randn(16, 3, 12, 12), torch.randn(16, 8, 10, 10).to(device)
    convert(network, kind, 1)
    normalised = network.to(device)(images.to(device))
    (normalised * weight).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [normalised.detach(), *gradients, *(buffer.float() for buffer in network.buffers())]


def nccl(device: torch.device, scratch: Path) -> dict[str, Any]:
    """Check the collectives, and on a GPU synchronised batch norm, in a process group of one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{scratch / 'store'}", rank=0, world_size=1)
    try:
        with patch.object(dist, "get_world_size", lambda *_: Lone(1)):
            found: dict[str, Any] = {"backend": backend, "collectives": collectives(device)}
            if device.type == "cuda":  # torch has it for GPUs alone
                found["sync_batch_norm_error"] = sync_batch_norm_error(device)
    finally:
        dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=("smoke", "nccl"))
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--data", type=Path, help="class folders; default: random files")
    parser.add_argument("--tiny", action="store_true", help="small images and batches, a few steps")
    asked = parser.parse_args()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # convolutions in float32 would be rounded to 10 bits
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
        scratch = Path(folder)
        if asked.check == "nccl":
            print(json.dumps(nccl(torch.device(asked.device), scratch)))
            return
        data = asked.data
        if data is None:
            sizes = load_config(PretrainConfig, "pretrain", asked.recipe, TINY if asked.tiny else ()).data
            data = make_files(scratch / "images", FILES_A_BATCH * sizes.global_batch, sizes.image_size)
        print(json.dumps(smoke(asked.recipe, data, scratch / "runs", asked.device, asked.tiny)))


if __name__ == "__main__":
    main()

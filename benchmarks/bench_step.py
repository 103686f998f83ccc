"""Compare our whole training step with its networks alone, and images a second with lightly's MoCo.

Three arms take turns, some steps each, so that a disturbance of the machine affects all of them:

- ours: a run of contrastive-pretrain as it is: loader, views, bank, mining, metrics, all callbacks;
- limit: the same networks, optimizer and moving average on random input, with the cheapest contrastive loss:
  no data, no views, no bank;
- lightly: MoCo v2 of lightly's own parts (dataset, transform, head, loss with its memory bank of 4,096 keys,
  update of the key network), in torch's DataLoader, with the same backbone, batch, optimizer and precision.
  Left out if lightly is not installed (pip install '.[bench]').

Views are MoCo v2's for both. Our bank is filled with random rows first, so it is mined from the first step.
Each of lightly's turns starts with some untimed steps, so that its workers run ahead as in a long run.

    python benchmarks/bench_step.py [--data DIR] [--device cuda] [--networks NAME ...] [--rounds N]

With --local N it measures what multi-crop costs instead: in one run, steps with two views and steps with N
further local views of half the side take turns, and the JSON is multicrop-DEVICE.json.

    python benchmarks/bench_step.py --local 4 [--networks NAME ...] [--rounds N]

With --encoders it measures one network of each family instead, ours and the limit alone (encoders-cpu.json).

DIR holds class folders, such as CIFAR-10 as JPEG; without it, random JPEG files are made. On a CPU: resnet18
and a resnet10 of width 16, 32 px, batch 256, float32, 2 workers; about 6 minutes on 2 cores. On CUDA:
resnet18 at 32 px, batch 512, and resnet50 at 224 px, batch 256, bfloat16, 16 workers.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import (
    RESULTS,
    Clock,
    Spent,
    context,
    make_files,
    median,
    once,
    quartiles,
    ratios,
    walls,
    write,
)
from torch import nn

from contrastive.augment.views import Views
from contrastive.compiling import compiler
from contrastive.config import PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.files import list_images
from contrastive.encoders.build import build_encoder
from contrastive.logging.memory import peak_memory
from contrastive.module import ContrastiveModule
from contrastive.networks import Networks
from contrastive.optim import build_optimizer
from contrastive.pretrain import pretrain

DIM, HIDDEN = 128, 2048


@dataclass(frozen=True)
class Scene:
    """One network and how long its turns are.

    Attributes:
        name: Name of the network.
        width: Channels of its first stage; None if it has no such setting.
        side: Side of the images, in pixels.
        batch: Images of a step.
        precision: Lightning's name of the precision.
        workers: Workers of lightly's loader; ours has none, its images are resident.
        steps: Steps of a turn.
        settle: Steps of lightly's turns before the clock starts.
        rounds: Turns of each arm.
        files: Number of images made if no data is given.
        goals: Speed goals relative to the limit, and to lightly, if that is measured too.
    """

    name: str
    width: int | None
    side: int
    batch: int
    precision: str
    workers: int
    steps: int
    settle: int
    rounds: int
    files: int
    goals: tuple[float, ...]


SCENES = {
    "cpu": (
        Scene("resnet18", 64, 32, 256, "32-true", 2, 2, 3, 5, 10_000, (0.90, 1.6)),
        Scene("resnet10", 16, 32, 256, "32-true", 2, 6, 4, 8, 10_000, (0.85, 2.0)),
    ),
    "cuda": (
        Scene("resnet18", 64, 32, 512, "bf16-mixed", 16, 20, 40, 6, 50_000, (0.85, 4.0)),
        Scene("resnet50", 64, 224, 256, "bf16-mixed", 16, 10, 10, 6, 4_096, (0.85, 4.0)),
    ),
}
FAMILIES = tuple(
    Scene(name, None, 32, 64, "32-true", 0, 3, 0, 6, 2_000, (0.85,))
    for name in (
        "cpu_resnet",
        "vit_tiny",
        "hybrid_resnet18",
        "convnext_tiny",
        "timm:tf_efficientnet_lite0",
        "torchvision:mobilenet_v3_small",
    )
)
"""Networks of --encoders, one of each family but the residual ones above."""


def load(scene: Scene, data: Path, runs: Path, device: str, *overrides: str) -> PretrainConfig:
    """Return the shipped CIFAR-10 recipe with one direction of the loss, as in lightly's MoCo."""
    return load_config(
        PretrainConfig,
        "pretrain",
        "cifar10",
        [
            f"run.root={runs}",
            "run.name=bench",
            "data.name=imagefolder",
            f"data.root={data}",
            f"data.image_size={scene.side}",
            f"data.global_batch={scene.batch}",
            "data.resident=true",
            "augment.view_1.crop_scale=[0.2,1.0]",
            f"encoder.name={scene.name}",
            *([] if scene.width is None else [f"encoder.width={scene.width}"]),
            f"encoder.projector_hidden={HIDDEN}",
            f"encoder.projector_dim={DIM}",
            "objective.symmetric=false",
            "bank.max_age=null",
            "optimizer.base_lr=0.01",
            f"trainer.precision={scene.precision}",
            f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
            "logging.knn_every_epochs=0",
            "logging.progress=false",
            "logging.wandb.mode=disabled",
            *overrides,
        ],
    )


def fill_bank(module: ContrastiveModule) -> None:
    """Fill the bank with random keys, so that it is mined from the first step."""
    rows, dim = module.plan.rows, module.config.encoder.projector_dim
    keys = F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    module.miner.write(keys.to(module.device), torch.arange(rows, device=module.device), 0)


class Turns(pl.Callback):
    """Time the run it is in, and let the other arms take their turns in between.

    Args:
        scene: The scene that is measured.
        others: Builds the other arms, by name: each runs one turn and returns its time.
        warmup: Steps before the first round.
    """

    def __init__(
        self,
        scene: Scene,
        others: Callable[[ContrastiveModule], dict[str, Callable[[], Spent]]],
        warmup: int = 3,
    ) -> None:
        self.scene, self.warmup, self._make = scene, warmup, others
        self.spent: dict[str, list[Spent]] = {"ours": []}
        self._left = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveModule)
        fill_bank(pl_module)
        self.others = self._make(pl_module)
        self.spent |= {name: [] for name in self.others}
        self._left = self.warmup

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._left -= 1
        if self._left:
            return
        if trainer.global_step > self.warmup:
            self.spent["ours"].append(self._clock.stop())
            for name, turn in self.others.items():
                self.spent[name].append(turn())
        if len(self.spent["ours"]) == self.scene.rounds:
            trainer.should_stop = True
        self._left = self.scene.steps
        self._clock = Clock(pl_module.device)


class LocalTurns(pl.Callback):
    """Let steps with different numbers of local views take turns in one run.

    Args:
        scene: The scene that is measured.
        counts: Numbers of local views; the first turn of each is not timed.
    """

    def __init__(self, scene: Scene, counts: tuple[int, ...]) -> None:
        self.scene, self.counts = scene, counts
        self.spent: dict[int, list[Spent]] = {count: [] for count in counts}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveModule)
        fill_bank(pl_module)
        config = pl_module.config
        backend = compiler(config.run.compile, pl_module.device)
        self._views = {
            count: Views(
                replace(config.augment, num_local=count), config.data, config.run.seed, compile=backend
            )
            for count in self.counts
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        turn, step = divmod(trainer.global_step, self.scene.steps)
        if step == 0:
            pl_module.views = pl_module._first_views = self._views[self.counts[turn % len(self.counts)]]
            self._clock = Clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        turn, left = divmod(trainer.global_step, self.scene.steps)
        if left == 0 and turn > len(self.counts):
            self.spent[self.counts[(turn - 1) % len(self.counts)]].append(self._clock.stop())
            trainer.should_stop = len(self.spent[self.counts[-1]]) == self.scene.rounds


class Limit:
    """Only the networks, the optimizer and the moving average of a run."""

    def __init__(self, scene: Scene, config: PretrainConfig, device: torch.device) -> None:
        encoder = build_encoder(config.encoder, scene.side)
        self.networks = Networks(encoder, config.encoder).to(device)
        self.networks.prepare(compiler(config.run.compile, device))
        self.networks.train()
        self.optimizer = build_optimizer(self.networks, config.optimizer, config.data.global_batch)
        self.scene, self.device = scene, device
        self.views = [
            torch.randn(scene.batch, 3, scene.side, scene.side, device=device).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        ]
        self.own = torch.arange(scene.batch, device=device)

    def step(self) -> None:
        networks = self.networks
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.scene.precision == "bf16-mixed"):
            query, key = networks.embed(self.views[0]), networks.embed_key(self.views[1])
        loss = F.cross_entropy(query @ key.T / 0.2, self.own)  # the batch's other keys, or it would collapse
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        networks.follow(0.99)

    def turn(self) -> Spent:
        return once(lambda: [self.step() for _ in range(self.scene.steps)], self.device)


class Lightly:
    """MoCo as in lightly's examples (examples/pytorch_lightning/moco.py), in a plain loop."""

    def __init__(self, scene: Scene, config: PretrainConfig, device: torch.device) -> None:
        from lightly.data import LightlyDataset
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.transforms import MoCoV2Transform

        def network() -> nn.Module:
            encoder = build_encoder(config.encoder, scene.side)
            return nn.Sequential(encoder, MoCoProjectionHead(encoder.dim, HIDDEN, DIM, batch_norm=True)).to(
                device
            )

        self.scene, self.device = scene, device
        self.query, self.key, self.follow = network(), network(), update_momentum
        deactivate_requires_grad(self.key)
        self.loss = NTXentLoss(temperature=0.2, memory_bank_size=(4096, DIM)).to(device)
        self.optimizer = torch.optim.SGD(self.query.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        transform = MoCoV2Transform(input_size=scene.side)
        self.dataset = LightlyDataset(str(Path(config.data.root or "")), transform=transform)

    def batches(self) -> Iterator[Any]:
        while True:
            yield from torch.utils.data.DataLoader(
                self.dataset,
                batch_size=self.scene.batch,
                shuffle=True,
                drop_last=True,
                num_workers=self.scene.workers,
                pin_memory=self.device.type == "cuda",
            )

    def step(self, batch: Any) -> None:
        view_1, view_2 = (view.to(self.device, non_blocking=True) for view in batch[0])
        self.follow(self.query, self.key, m=0.99)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.scene.precision == "bf16-mixed"):
            query = self.query(view_1)
            with torch.no_grad():
                key = self.key(view_2)
            loss = self.loss(query, key)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def turn(self) -> Spent:
        batches = self.batches()  # its workers end with it, so that they never run in another arm's turn
        for _ in range(self.scene.settle):
            self.step(next(batches))
        return once(lambda: [self.step(next(batches)) for _ in range(self.scene.steps)], self.device)


def other_arms(scene: Scene, config: PretrainConfig, device: torch.device) -> dict[str, Callable[[], Spent]]:
    arms: dict[str, Any] = {"limit": Limit(scene, config, device)}
    try:
        if len(scene.goals) > 1:
            arms["lightly"] = Lightly(scene, config, device)
    except ImportError as error:
        print(f"lightly's arm is left out ({error}); pip install '.[bench]'")
    for _ in range(3):
        arms["limit"].step()
    return {name: arm.turn for name, arm in arms.items()}


def measure(scene: Scene, data: Path, device: str) -> list[dict[str, Any]]:
    """Measure ours, the limit and lightly."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        config = load(scene, data, Path(scratch), device)
        turns = Turns(scene, lambda module: other_arms(scene, config, module.device))
        train(config, turns)
    return [row(scene, name, turns.spent) for name in turns.spent]


def measure_local(scene: Scene, data: Path, device: str, count: int) -> list[dict[str, Any]]:
    """Measure steps with two views, and with ``count`` local ones of half the side besides."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        config = load(scene, data, Path(scratch), device, f"augment.local_size={scene.side // 2}")
        turns = LocalTurns(scene, (0, count))
        train(config, turns)
    slower = ratios(turns.spent[count], turns.spent[0])
    two, more = (
        about(scene) | {"local_views": local, "step_ms": 1e3 * median(walls(spent)) / scene.steps}
        for local, spent in turns.spent.items()
    )
    area = (config.augment.local_side(scene.side) / scene.side) ** 2
    return [
        two,
        more
        | {
            "over_two_views": median(slower),
            "over_two_views_quartiles": quartiles(slower),
            # Passes: 3 of the query's view, with gradient, and 1 of the key's; 3 of each local view.
            "over_two_views_by_area": 1 + count * area * 3 / 4,
        },
    ]


def train(config: PretrainConfig, callback: pl.Callback) -> None:
    code, _ = pretrain(config, callbacks=[callback])
    if code:
        raise SystemExit(f"the run ended with exit code {code}")


def about(scene: Scene) -> dict[str, Any]:
    """Return the columns that say what was measured."""
    return {
        "network": scene.name if scene.width is None else f"{scene.name} width {scene.width}",
        "side": scene.side,
        "batch": scene.batch,
        "precision": scene.precision,
    }


def row(scene: Scene, name: str, spent: dict[str, list[Spent]]) -> dict[str, Any]:
    images, mine = scene.batch * scene.steps, spent[name]
    low, high = quartiles(walls(mine))
    made = about(scene) | {
        "arm": name,
        "step_ms": 1e3 * median(walls(mine)) / scene.steps,
        "images_per_s": images / median(walls(mine)),
        "images_per_s_quartiles": [images / high, images / low],
    }
    if name != "ours":
        speed = ratios(mine, spent["ours"])
        made |= {"ours_over_this": median(speed), "ours_over_this_quartiles": quartiles(speed)}
        made["goal"] = scene.goals[0 if name == "limit" else 1]
    if name == "limit":  # lightly's workers are processes of their own
        made["ours_over_this_processor"] = median(
            [a.processor / b.processor for a, b in zip(mine, spent["ours"], strict=True)]
        )
    return made


def show(made: dict[str, Any]) -> None:
    low, high = made["images_per_s_quartiles"]
    line = (
        f"{made['network']:30} {made['side']:4} {made['batch']:4} {made['arm']:8} {made['step_ms']:9.1f} "
        f"{made['images_per_s']:9.1f} {low:9.1f} {high:9.1f}"
    )
    if "goal" in made:
        low, high = made["ours_over_this_quartiles"]
        line += f"   {made['ours_over_this']:5.2f} ({low:.2f} to {high:.2f}), goal {made['goal']:.2f}"
    if "ours_over_this_processor" in made:
        line += f"; processor {made['ours_over_this_processor']:.2f}"
    print(line, flush=True)


def show_local(made: dict[str, Any]) -> None:
    line = f"{made['network']:18} 2 views and {made['local_views']} local: {made['step_ms']:.1f} ms"
    if "over_two_views" in made:
        low, high = made["over_two_views_quartiles"]
        line += f", {made['over_two_views']:.2f} times as long ({low:.2f} to {high:.2f}"
        line += f"; by their area {made['over_two_views_by_area']:.2f})"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="class folders; default: random files")
    parser.add_argument("--device", default="cpu", choices=tuple(SCENES))
    parser.add_argument("--networks", nargs="+", help="default: all of the device's")
    parser.add_argument("--rounds", type=int, help="turns of each arm; default by network")
    parser.add_argument("--local", type=int, help="local views: measure what they add to a step instead")
    parser.add_argument("--encoders", action="store_true", help="one network of each family instead")
    parser.add_argument(
        "--out", type=Path, help="JSON; default benchmarks/results/(step|multicrop|encoders)-DEVICE.json"
    )
    options = parser.parse_args()
    known = FAMILIES if options.encoders else SCENES[options.device]
    scenes = [scene for scene in known if not options.networks or scene.name in options.networks]
    if not scenes:
        parser.error(f"--networks {options.networks}: allowed are {[scene.name for scene in known]}")
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a spread needs 2 or more")
    if options.local is not None and options.local < 1:
        parser.error(f"--local {options.local}: 1 or more local views are needed")
    if not options.local:
        speeds = f"{'ms':>9} {'images/s':>9} {'quartiles':>19}"
        print(f"{'network':30} {'px':>4} {'b':>4} {'arm':8} {speeds}   ours over")
    rows = []
    for scene in scenes:
        scene = replace(scene, rounds=options.rounds or scene.rounds)
        with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
            data = options.data or make_files(Path(folder), scene.files, scene.side)
            if options.local:
                found = measure_local(scene, data, options.device, options.local)
            else:
                found = measure(scene, data, options.device)
            for made in found:
                rows.append(made | {"images": len(list_images(data)), "rounds": scene.rounds})
                (show_local if options.local else show)(made)
    packages = ("torch", "torchvision", "kornia", "pytorch-lightning")
    device = torch.device(options.device)
    name = "multicrop" if options.local else "encoders" if options.encoders else "step"
    write(
        options.out or RESULTS / f"{name}-{options.device}.json",
        context(name, device, packages, peak_memory_mib=peak_memory(device)) | {"rows": rows},
    )


if __name__ == "__main__":
    main()

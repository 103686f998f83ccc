"""Measure what mining adds to a training step: off, in line, overlapped; exact, FAISS; small, large bank.

A step is: two views of 256 images, query and key network, negatives, loss, backward, optimizer, EMA, bank.
With mining off the negatives are fixed random rows of the same shape and there is no bank. ``in line`` looks
up with the fresh query; ``overlapped`` looks up two steps ahead with the stored keys, on a background thread.
A turn is some steps and the wait for the worker, so that background work of one arm never slows the next.

Banks hold rows around random centres: the cost of a search depends on the lengths of the lists, not on the
images that the rows show.

    python benchmarks/bench_mining.py [--device cuda] [--rows 50000,1280000] [--threads N]
    python benchmarks/bench_mining.py --arms --rows 10000,50000,1280000 [--threads N]

``--arms`` compares the arms of the regimes (``ablate_presets.py``) instead of search backends, at K = 64 and
with the backend that ``auto`` chooses. ``batch`` has no bank and both views as queries (``sogclr`` takes as
long); ``neighbours`` is a step of ``batch`` and its share of composing an epoch.

On a CPU the network is resnet10 of width 16 at 32 px; on CUDA, under bfloat16, ResNet-18 at 32 px for banks
of up to 200,000 rows (CIFAR) and ResNet-50 at 224 px above (ImageNet). --encoder, --width, --image-size,
--batch change it.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablate_presets import BUDGET, at_budget, without_budget
from common import (
    RESULTS,
    Spent,
    context,
    median,
    once,
    quartiles,
    ratios,
    take_turns,
    walls,
    whole_numbers,
    write,
)
from torch import Tensor, nn

from contrastive.augment.views import Views
from contrastive.config import AugmentConfig, DataConfig, EncoderConfig, NeighboursConfig, PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.order.neighbours import NeighbourOrder
from contrastive.encoders.build import build_encoder
from contrastive.logging.memory import peak_memory
from contrastive.momentum import Ema
from contrastive.objectives.info_nce import info_nce
from contrastive.projector import projector
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives, log_mask

DIM = 128
NUM_HARD = NUM_UNIFORM = 256
SAMPLE = 5120
CENTRES = 4096
LAG = 2  # steps ahead: a look-up has a whole step's time
POOL = 1024  # images, used again and again
SMALL_BANK = 200_000
PIECE = 65_536
GOAL = 0.03
Mine = Callable[[Tensor, Tensor, Tensor, int], Negatives]  # query, key, ids, step
BACKENDS = ("exact", "faiss", "subsample")


@dataclass
class Scene:
    """Size of the network and of its images."""

    encoder: EncoderConfig
    data: DataConfig
    autocast: bool


class Learner:
    """Query and key network, and one training step of them."""

    def __init__(self, scene: Scene, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.autocast = device, scene.data.global_batch, scene.autocast
        encoder = build_encoder(scene.encoder, scene.data.image_size)
        head = projector(encoder.dim, scene.encoder.projector_hidden, 2, DIM)
        self.network = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        self.follow = Ema(self.network, self.key_network)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)
        self.views = Views(AugmentConfig(), scene.data, seed=0)
        size = scene.data.stored_size
        self.images = torch.randint(0, 256, (POOL, 3, size, size), dtype=torch.uint8, device=device)

    def step_of_batch(self, ids: Tensor, number: int) -> None:
        """Run one optimizer step of SimCLR: both views are queries, the batch's other views negatives."""
        first, second = self.views(self.images[ids % POOL], ids, number)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            views = [F.normalize(self.network(view).float(), dim=1) for view in (first, second)]
        own = torch.eye(len(ids), dtype=torch.bool, device=self.device).repeat(1, 2)
        others = Negatives.none(views[0]).with_shared(torch.cat(views), ids.repeat(2), log_mask(own))
        losses = [info_nce(*pair, others, temperature=0.2)[0] for pair in (views, views[::-1])]
        self._descend(torch.stack(losses).mean())

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def step(self, ids: Tensor, number: int, mine: Mine) -> Tensor:
        """Run one optimizer step; return the keys for the bank."""
        first, second = self.views(self.images[ids % POOL], ids, number)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            query = F.normalize(self.network(first).float(), dim=1)
            with torch.no_grad():
                key = F.normalize(self.key_network(second).float(), dim=1)
        loss, _ = info_nce(query, key, mine(query.detach(), key, ids, number), temperature=0.2)
        self._descend(loss)
        self.follow(0.99)
        return key


class Plan:
    """Rows of each step: the bank's rows in one shuffled order, repeated."""

    def __init__(self, rows: int, batch: int, device: torch.device) -> None:
        self._order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
        self._offset = torch.arange(batch, device=device)

    def ids(self, step: int) -> Tensor:
        return self._order[(self._offset + step * len(self._offset)) % len(self._order)]


class Loop:
    """Training steps with a miner, or with random negatives.

    A turn ends with the metrics of a logged step, which wait for the worker.
    """

    def __init__(self, learner: Learner, plan: Plan, steps: int, miner: Miner | None = None) -> None:
        self.learner, self.plan, self.steps, self.miner, self.number = learner, plan, steps, miner, 0
        random = _random_negatives(learner.batch, learner.device)
        self._mine: Mine = (lambda *_: random) if miner is None else miner.negatives

    def turn(self) -> None:
        for _ in range(self.steps):
            ids = self.plan.ids(self.number)
            key = self.learner.step(ids, self.number, self._mine)
            if self.miner is not None:
                self.miner.write(key, ids, self.number)
            self.number += 1
        if self.miner is not None:
            self.miner.metrics()


class BatchLoop:
    """Training steps whose negatives are the batch; see ``Loop``."""

    def __init__(self, learner: Learner, plan: Plan, steps: int) -> None:
        self.learner, self.plan, self.steps, self.number = learner, plan, steps, 0

    def turn(self) -> None:
        for _ in range(self.steps):
            self.learner.step_of_batch(self.plan.ids(self.number), self.number)
            self.number += 1


def _random_negatives(batch: int, device: torch.device) -> Negatives:
    """Return random negatives of the shape that a sample returns: queries share rows."""
    rows = F.normalize(torch.randn(SAMPLE + NUM_UNIFORM, DIM, device=device), dim=1)
    index = torch.randint(SAMPLE, (batch, NUM_HARD), device=device)
    hard = replace(
        Negatives.none(rows[:batch]),
        hard=rows[:SAMPLE],
        hard_index=index,
        hard_log_weight=torch.zeros(index.shape, device=device),
        hard_ids=index,
    )
    return hard.with_shared(rows[SAMPLE:], index.new_zeros(NUM_UNIFORM), rows.new_zeros(batch, NUM_UNIFORM))


def make_rows(rows: int) -> Tensor:
    """Return float16 unit rows around random centres."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(CENTRES, DIM, generator=generator), dim=1)
    parts = []
    for ids in torch.arange(rows).split(PIECE):
        centre = centres[torch.randint(0, CENTRES, (len(ids),), generator=generator)]
        noise = torch.randn(len(ids), DIM, generator=generator) / DIM**0.5
        parts.append(F.normalize(centre + 0.7 * noise, dim=1).half())
    return torch.cat(parts)


def mining(backend: str, overlapped: bool) -> MiningConfig:
    """Return settings that mine the nearest rows, as an index serves no deep band; recall checks are off."""
    depth = {} if backend != "subsample" else {"band": [0.001, 0.05]}
    shallow = {"band": [0.0, 1e-6], "skip_top": 0.0} | depth
    ahead = {"query": "stored", "lag": LAG, "overlap": True} if overlapped else {"query": "fresh"}
    sizes = {"num_hard": NUM_HARD, "num_uniform": NUM_UNIFORM}
    return MiningConfig(backend=backend, recall_every=0, **sizes, **shallow, **ahead)


def make_miner(
    keys: Tensor, plan: Plan, device: torch.device, config: MiningConfig, bank: BankConfig | None = None
) -> Miner:
    """Build a miner with a full bank, filled directly: a step's write would train an index half full."""
    rows = len(keys)
    miner = build_miner(
        bank or BankConfig(), config, rows=rows, dim=DIM, seed=0, device=device, upcoming=plan.ids
    )
    for ids in torch.arange(rows).split(PIECE):
        miner.retrieval.update(miner.bank.write(keys[ids], ids, 0))
    return miner


def make_miners(
    keys: Tensor, plan: Plan, device: torch.device, backend: str
) -> tuple[dict[str, Miner], float]:
    """Return miners in line and overlapped, and the seconds of the first look-up (it trains an index)."""
    in_line = make_miner(keys, plan, device, mining(backend, overlapped=False))
    query, ids = keys[:1].float().to(device), torch.zeros(1, dtype=torch.int64, device=device)
    first = once(lambda: in_line.nearest(query, ids, 0, 1), device)
    overlapped = make_miner(keys, plan, device, mining(backend, overlapped=True))
    overlapped.retrieval.load_state_dict(in_line.retrieval.state_dict())
    return {f"{backend}, in line": in_line, f"{backend}, overlapped": overlapped}, first.wall


def arm_settings(rows: int) -> dict[str, PretrainConfig]:
    """Return the settings of the arms that mine, at K = 64."""
    arms = without_budget(0.0) | at_budget(BUDGET, 0.0)
    configs = {arm: load_config(PretrainConfig, "pretrain", "cifar10", [*arms[arm]]) for arm in arms}
    mined = {arm: config for arm, config in configs.items() if config.method == "moco"}
    return {arm: config for arm, config in mined.items() if arm != "all_rows" or rows <= SMALL_BANK}


def make_arm(keys: Tensor, plan: Plan, device: torch.device, config: PretrainConfig) -> Miner:
    """Build the miner of an arm with a full bank; recall checks are off."""
    if config.bank.kind == "queue":
        keys = keys[: config.bank.capacity]
    return make_miner(keys, plan, device, replace(config.mining, recall_every=0), config.bank)


def compose_seconds(keys: Tensor, device: torch.device) -> float:
    """Return the seconds that ``data.order=neighbours`` takes to compose an epoch of ``keys``."""
    order = NeighbourOrder(len(keys), 0, NeighboursConfig(), 0.0)
    known = torch.ones(len(keys), dtype=torch.bool, device=device)
    return once(lambda: order.compose(1, keys.to(device), known), device).wall


def measure_arms(rows: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time a step of every arm; what it adds is over a step with as many fixed random negatives."""
    scene = make_scene(rows, options, device)
    learner, plan = Learner(scene, device), Plan(rows, scene.data.global_batch, device)
    print(f"\nbank of {rows} rows, batch {learner.batch}, K = {BUDGET}", flush=True)
    keys = make_rows(rows)
    miners = {arm: make_arm(keys, plan, device, config) for arm, config in arm_settings(rows).items()}
    loops = {"off": Loop(learner, plan, options.steps)}
    loops |= {arm: Loop(learner, plan, options.steps, miner) for arm, miner in miners.items()}
    turns = {name: loop.turn for name, loop in loops.items()}
    turns["batch"] = BatchLoop(learner, plan, options.steps).turn
    spent = take_turns(turns, options.repeats, device=device)
    found = [_row(name, times, spent["off"], options.steps) for name, times in spent.items()]
    for row in found:
        row |= {"rows": rows, "batch": learner.batch, "backend": None}
        if row["mining"] in miners:
            row["backend"] = miners[row["mining"]].retrieval.describe()
    if rows <= SMALL_BANK:
        composed = compose_seconds(keys, device)
        batch, a_step = found[-1], 1e3 * composed / (rows // learner.batch)
        in_all = {
            "step_ms": batch["step_ms"] + a_step,
            "added": batch["added"] + a_step / found[0]["step_ms"],
        }
        found.append({**batch, "mining": "neighbours", **in_all, "compose_s": composed})
    for miner in miners.values():
        miner.close()
    _show(found)
    return found


def _row(name: str, times: list[Spent], off: list[Spent], steps: int) -> dict[str, Any]:
    step = [1e3 * wall / steps for wall in walls(times)]
    added = [ratio - 1 for ratio in ratios(times, off)]
    return {
        "mining": name,
        "step_ms": median(step),
        "step_ms_quartiles": quartiles(step),
        "added": median(added),
        "added_quartiles": quartiles(added),
    }


def measure(rows: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    scene = make_scene(rows, options, device)
    learner, plan = Learner(scene, device), Plan(rows, scene.data.global_batch, device)
    described = f"{scene.encoder.name} of width {scene.encoder.width}, {scene.data.image_size} px"
    print(f"\nbank of {rows} rows, {described}, batch {learner.batch}", flush=True)
    keys = make_rows(rows)
    miners: dict[str, Miner] = {}
    for backend in options.backends:
        made, seconds = make_miners(keys, plan, device, backend)
        print(f"  {next(iter(made.values())).describe()}; first look-up {seconds:.1f} s", flush=True)
        miners |= made
    arms = {"off": None, **miners}
    turns = {name: Loop(learner, plan, options.steps, miner).turn for name, miner in arms.items()}
    spent = take_turns(turns, options.repeats, device=device)
    found = []
    for name, times in spent.items():
        found.append(
            {"rows": rows, "encoder": described, "batch": learner.batch}
            | _row(name, times, spent["off"], options.steps)
            | {"backend": miners[name].retrieval.describe() if name in miners else None}
        )
    for miner in miners.values():
        miner.close()
    _show(found)
    return found


def make_scene(rows: int, options: argparse.Namespace, device: torch.device) -> Scene:
    on_gpu, large = device.type == "cuda", rows > SMALL_BANK
    name, width, size = ("resnet10", 16, 32) if not on_gpu else ("resnet18", 64, 32)
    if on_gpu and large:
        name, width, size = "resnet50", 64, 224
    encoder = EncoderConfig(
        name=options.encoder or name,
        width=options.width or width,
        projector_hidden=512 if not on_gpu else 2048,
    )
    data = DataConfig(image_size=options.image_size or size, global_batch=options.batch)
    return Scene(encoder, data, autocast=on_gpu)


def _show(found: list[dict[str, Any]]) -> None:
    print(f"{'rows':>9} {'mining':24} {'ms a step':>10} {'quartiles':>19} {'added':>8} {'quartiles':>17}")
    for row in found:
        low, high = row["step_ms_quartiles"]
        less, more = row["added_quartiles"]
        print(
            f"{row['rows']:9} {row['mining']:24} {row['step_ms']:10.2f} {low:9.2f} {high:9.2f} "
            f"{row['added']:8.1%} {less:8.1%} {more:8.1%}",
            flush=True,
        )


def best(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each bank, the way of mining that adds the least."""
    mined = [row for row in found if row["mining"] != "off"]
    sizes = dict.fromkeys(row["rows"] for row in mined)
    return [
        min((row for row in mined if row["rows"] == rows), key=lambda row: row["added"]) for rows in sizes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=whole_numbers, default=[50_000, 1_280_000])
    parser.add_argument("--backends", nargs="+", default=["exact", "faiss"], choices=BACKENDS)
    parser.add_argument("--arms", action="store_true", help="compare the arms of the regimes")
    parser.add_argument("--encoder", choices=("resnet10", "resnet18", "resnet34", "resnet50"))
    parser.add_argument("--width", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, help="steps of a turn; default 3, on CUDA 10")
    parser.add_argument("--repeats", type=int, help="repeats of each arm; default 5, on CUDA 9")
    parser.add_argument("--threads", type=int, help="threads of torch and FAISS; default: their own choice")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/bench_mining-DEVICE.json")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    options.steps = options.steps or (10 if on_gpu else 3)
    options.repeats = options.repeats or (9 if on_gpu else 5)
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: a spread needs 2 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    measured = measure_arms if options.arms else measure
    found = [row for rows in options.rows for row in measured(rows, options, device)]
    about = context(
        "mining",
        device,
        ("torch", "faiss-cpu"),
        repeats=options.repeats,
        steps_a_turn=options.steps,
        lag=LAG,
        hard=NUM_HARD,
        uniform=NUM_UNIFORM,
        peak_memory_mib=peak_memory(device),
    )
    name = "bench_mining-arms" if options.arms else "bench_mining"
    out = options.out or RESULTS / f"{name}-{options.device}.json"
    if options.arms:
        write(out, about | {"rows": found, "k": BUDGET})
        return
    write(out, about | {"rows": found, "best": best(found)})
    for row in best(found):
        asked = f" (goal: {GOAL:.0%} or less)" if on_gpu else ""
        print(f"{row['rows']} rows: {row['mining']} adds the least, {row['added']:.1%}{asked}")


if __name__ == "__main__":
    main()

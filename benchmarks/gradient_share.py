"""Measure how much of the gradient of all rows lies in the hardest ones, over a training.

    python benchmarks/gradient_share.py --preset classes --data DIR [--temperature 0.2]

Trains the arm ``all_rows`` of a preset of ``ablate.py``. Once an epoch, for the queries at hand and all rows
of the bank but their own: p is the softmax over the positive and the rows; a row's weight in the gradient
with respect to the query is its p. Written are, as medians over queries, the share of the K largest weights
in all of them, and the effective number of negatives (sum of weights) ** 2 / sum of their squares. If the K
hardest carry most of the gradient, mining K rows loses little; if the effective number is in the hundreds,
K = 64 of any kind is an estimate.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from ablate import choose_presets, open_ablation
from ablate_cell import configure
from common import RESULTS, context, write
from torch import Tensor

from contrastive.pretrain import pretrain
from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives

BUDGETS = (16, 64, 256, 1024)
SEED = 300  # none of the ablation's


def shares(query: Tensor, key: Tensor, rows: Tensor, own: Tensor, temperature: float) -> dict[str, float]:
    """Return shares and effective number of the weights on ``rows`` (n, d) for queries (b, d), as medians.

    Args:
        query: Unit rows.
        key: Their positives.
        rows: All rows of the bank.
        own: (b, n) True for rows that are no negative of the query.
        temperature: Temperature of the loss.
    """
    logits = (query @ rows.T / temperature).masked_fill(own, -torch.inf)
    positive = (query * key).sum(1, keepdim=True) / temperature
    weight = torch.cat([positive, logits], 1).softmax(1)[:, 1:].double()
    total, largest = weight.sum(1), weight.sort(1, descending=True).values
    found = {f"share_{k}": (largest[:, :k].sum(1) / total).median() for k in BUDGETS}
    found["effective"] = (total.square() / weight.square().sum(1)).median()
    found["pushed"] = total.median()
    return {name: round(float(value), 4) for name, value in found.items()}


class Gauge:
    """Compute ``shares`` once an epoch of ``miner``'s run, from its second on."""

    def __init__(self, miner: Miner, steps: int, temperature: float) -> None:
        self._miner, self._steps, self._temperature = miner, steps, temperature
        self._inner = miner.negatives
        self.found: list[dict[str, float]] = []
        miner.negatives = self.negatives  # type: ignore[method-assign]

    def negatives(self, query: Tensor, key: Tensor, ids: Tensor, step: int, **batch: Any) -> Negatives:
        if step % self._steps == 0 and self._miner.ready():
            bank = self._miner.bank
            own = (bank.id[None] == ids[:, None]) | (bank.id < 0)[None]
            found = shares(query.detach().float(), key.float(), bank.key.float(), own, self._temperature)
            self.found.append({"epoch": step // self._steps, **found})
        return self._inner(query, key, ids, step, **batch)


def measure(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    ablation = open_ablation(name, asked)
    cell = ablation.cell("all_rows", asked.temperature, SEED, "test")
    steps = ablation.rows // ablation.preset.batch
    gauges: list[Gauge] = []

    def build(*settings: Any, **given: Any) -> Miner:
        miner = build_miner(*settings, **given)
        gauges.append(Gauge(miner, steps, asked.temperature))
        return miner

    run_dir = ablation.folder / "runs" / cell.name
    shutil.rmtree(run_dir, ignore_errors=True)
    pretrain(configure(cell, ablation.folder), keep_precision=True, miner=build)
    shutil.rmtree(run_dir)
    return {"rows": ablation.rows, "temperature": asked.temperature, "epochs": gauges[0].found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", type=choose_presets, required=True, help="names separated by commas")
    parser.add_argument("--data", type=Path, required=True, help="as for ablate.py")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--cache", type=Path, default=Path(".data/ablate"))
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.cells, asked.arms = RESULTS, "all"
    found = {name: measure(asked, name) for name in asked.preset}
    about = context("gradient_share", torch.device("cpu"), ("torch",), seed=SEED)
    write(RESULTS / "gradient_share.json", about | {"presets": found})


if __name__ == "__main__":
    main()

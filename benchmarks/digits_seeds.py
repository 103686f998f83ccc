"""Measure the demo's numbers over seeds: pretrain on digits, probe, kNN, few labels; mean and 95% t-interval.

    python benchmarks/digits_seeds.py --seeds 0 1 2 3 4
    python benchmarks/digits_seeds.py --encoder vit_tiny    (or hybrid_resnet18; the same images and epochs)

Writes benchmarks/results/digits_seeds.json (of another encoder digits_seeds_NAME.json) and prints the table
of the README. Finished runs are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, context

from eval.scores import t_reach

ROWS = {
    "linear probe, all 1,335 labels": ("linear", "top1"),
    "linear probe, 10% of the labels": ("lowshot", "top1 at 10%"),
    "linear probe, 1 label a class": ("lowshot", "top1 at 1 a class"),
    "kNN, k=20": ("knn", "top1 k=20"),
}
_ADAMW = ["optimizer.name=adamw", "optimizer.base_lr=1e-3", "optimizer.weight_decay=0.05"]
_SMALL_VIT = "{embed_dim: 96, depth: 4, num_heads: 3, patch_size: 4, positions: sincos, global_pool: avg}"
ENCODERS = {
    "resnet10": [],
    "vit_tiny": ["encoder.name=vit_tiny", f"encoder.args={_SMALL_VIT}", *_ADAMW],
    "hybrid_resnet18": ["encoder.name=hybrid_resnet18", "encoder.args={depth: 2}", *_ADAMW],
}
"""Settings that differ from the recipe's, by encoder."""


def command(*arguments: str) -> dict[str, Any]:
    """Run one of the project's commands; return its result, the last line it prints."""
    result = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def run(seed: int, encoder: str, root: str, overrides: list[str]) -> dict[str, Any]:
    """Train and score one seed."""
    started = time.monotonic()
    name = f"digits-seed-{seed}" if encoder == "resnet10" else f"digits-{encoder}-seed-{seed}"
    place = [f"run.root={root}", f"run.name={name}", f"run.seed={seed}", "logging.wandb.mode=disabled"]
    trained = command("contrastive", *place, *ENCODERS[encoder], *overrides)
    protocols = ("linear", "lowshot", "knn")
    scores = {name_: command("eval", name_, f"checkpoint={root}/{name}")["scores"] for name_ in protocols}
    seconds = time.monotonic() - started
    return {"seed": seed, "train_s": trained["seconds"], "all_s": round(seconds, 1), "scores": scores}


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean with the half width of its 95% t-interval, inf for a single value."""
    half = t_reach(torch.tensor(values, dtype=torch.float64))
    return {"mean": statistics.mean(values), "half_95": half, "min": min(values), "max": max(values)}


def tabulate(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each row's arms over seeds, and the encoder's paired gain over each baseline."""
    table = {}
    for title, (protocol, score) in ROWS.items():
        found = [one["scores"][protocol][score] for one in runs]
        table[title] = {arm: interval([one[arm] for one in found]) for arm in found[0]}
        for arm in ("raw_pixels", "random_encoder"):
            table[title][f"encoder - {arm}"] = interval([one["encoder"] - one[arm] for one in found])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--encoder", choices=ENCODERS, default="resnet10")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", help="key=value for contrastive-pretrain")
    asked = parser.parse_args()
    runs = [run(seed, asked.encoder, asked.root, asked.overrides) for seed in asked.seeds]
    table = tabulate(runs)
    suffix = "" if asked.encoder == "resnet10" else f"_{asked.encoder}"
    out = asked.out or RESULTS / f"digits_seeds{suffix}.json"
    packages = ("torch", "kornia", "faiss-cpu", "pytorch-lightning")
    document = context(
        "digits_seeds", torch.device("cpu"), packages, encoder=asked.encoder, overrides=asked.overrides
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**document, "table": table, "runs": runs}, indent=1) + "\n")
    print(f"| top-1 %, mean of {len(runs)} seeds | encoder | raw pixels | random encoder |")
    print("|---|---|---|---|")
    for title, arms in table.items():
        own, *others = (arms[arm] for arm in ("encoder", "raw_pixels", "random_encoder"))
        baselines = " | ".join(f"{100 * other['mean']:.1f}" for other in others)
        print(f"| {title} | **{100 * own['mean']:.1f}** ± {100 * own['half_95']:.1f} | {baselines} |")


if __name__ == "__main__":
    main()

"""Try ``--config own`` on unlike folders: one command each, no setting but the folder, the time and the seed.

    python benchmarks/folders.py --out DIR ...      (makes the folders)
    python benchmarks/own_folders.py --folders DIR --minutes 10 --seeds 0 1 2

For each folder and seed: ``contrastive-pretrain --config own data.root=DIR/NAME schedule.minutes=N``, then
``contrastive-eval worth``. Finished runs are not repeated. Adds the runs to
benchmarks/results/own_folders.json, and prints a table of all runs there: a cell is the encoder's score and
what it gains over the better of raw pixels and a random encoder, with the 95% interval of that gain (over
test images for the probe and kNN, over draws of labels for few labels).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, context, write

COLUMNS = ("linear probe", "kNN", "10 labels a class")
PACKAGES = ("torch", "pytorch-lightning")
UNLABELLED = {"outfits": ("frames", "identities")}
"""Folder -> its part without labels, to train on, and its part with labels, to score."""


def run(folder: Path, seed: int, minutes: float, root: Path) -> dict[str, Any]:
    """Train on one folder, and score."""
    name = f"{folder.name}-{minutes:g}-{seed}"
    train, scored = folder, []
    if folder.name in UNLABELLED:
        train, labelled = (folder / part for part in UNLABELLED[folder.name])
        scored = ["data.name=imagefolder", f"data.root={labelled}"]
    result = root / name / "eval" / "worth.json"
    if not result.is_file():
        place = [f"run.root={root}", f"run.name={name}", "logging.wandb.mode=disabled"]
        own = ["--config", "own", f"data.root={train}", f"schedule.minutes={minutes}", f"run.seed={seed}"]
        command("contrastive", *own, *place, "logging.progress=false")
        out = f"out={result.parent}"
        command("eval", "worth", f"checkpoint={root / name}", *scored, out, "progress=false")
    found = json.loads(result.read_text())
    summary = json.loads((root / name / "summary.json").read_text())
    kept = ("seconds", "step", "epochs")
    return {
        "folder": folder.name,
        "seed": seed,
        "trained": {key: summary[key] for key in kept if key in summary},
        "answer": found["answer"],
        "scores": found["scores"],
        "made_by": context("own_folders", torch.device("cpu"), PACKAGES, minutes=minutes),
    }


def command(*arguments: str) -> None:
    """Run one of the project's commands."""
    subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL, check=True)


def cell(rows: list[dict[str, Any]]) -> str:
    """Return the mean score over seeds, and the smallest and largest gain over the better baseline."""
    if not rows:
        return ""
    own = statistics.mean(row["encoder"]["value"] for row in rows)
    gains = [min(row[name]["gain"]["value"] for name in ("raw_pixels", "random_encoder")) for row in rows]
    lows = [min(row[name]["gain"]["low"] for name in ("raw_pixels", "random_encoder")) for row in rows]
    highs = [min(row[name]["gain"]["high"] for name in ("raw_pixels", "random_encoder")) for row in rows]
    mark = "above" if min(lows) > 0 else "below" if max(highs) < 0 else "level"
    interval = f"{100 * min(lows):+.1f} to {100 * max(highs):+.1f}"
    return f"{100 * own:.1f} ({100 * statistics.mean(gains):+.1f}: {interval}; {mark})"


def tabulate(runs: list[dict[str, Any]]) -> list[str]:
    """Return the table's lines."""
    lines = ["| folder | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for folder in dict.fromkeys(one["folder"] for one in runs):
        chosen = [one for one in runs if one["folder"] == folder]
        cells = [
            cell([row for one in chosen for row in one["scores"] if row["name"].startswith(column)])
            for column in COLUMNS
        ]
        lines.append(f"| {folder} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folders", type=Path, required=True)
    parser.add_argument("--names", nargs="*", help="only these folders")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--root", type=Path, default=Path("runs/own-folders"))
    parser.add_argument("--out", type=Path, default=RESULTS / "own_folders.json")
    asked = parser.parse_args()
    names = asked.names or sorted(folder.name for folder in asked.folders.iterdir())
    known = json.loads(asked.out.read_text())["runs"] if asked.out.is_file() else []
    runs = {(one["folder"], one["seed"]): one for one in known}
    for seed in asked.seeds:
        for name in names:
            runs[name, seed] = run(asked.folders / name, seed, asked.minutes, asked.root)
            write(asked.out, {"benchmark": "own_folders", "runs": list(runs.values())})
    print("\n".join(tabulate(list(runs.values()))))


if __name__ == "__main__":
    main()

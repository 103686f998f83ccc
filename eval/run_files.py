"""What reports read of a run directory: results, curves, tables."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contrastive.config import UserError
from eval.figures import Points

TITLES = {
    "linear": "Linear probe",
    "linear-sgd_augmented": "Linear probe, SGD on random views",
    "knn": "Nearest neighbours",
    "lowshot": "Few labels",
    "finetune": "Fine-tuned",
}
"""Protocols that give accuracies, as headings."""
BASELINES = {"raw_pixels": "raw pixels", "random_encoder": "random encoder"}
STATISTICS = {
    "verdict": "verdict",
    "rankme": "effective rank (RankMe)",
    "dimensions": "of dimensions",
    "alignment": "alignment of two views, 0 is best",
    "uniformity": "uniformity, -4 is best",
    "std": "spread, 1 is isotropic",
}
"""Numbers of the stats protocol, in words."""
CHARTS: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...], str], ...] = (
    ("Loss", (("loss", ("train/loss",)),), ""),
    (
        "Similarity to the query",
        (
            ("positive", ("mining/positive_similarity", "train/positive_similarity")),
            ("mined negatives", ("mining/similarity_mean",)),
            ("their top tenth", ("mining/similarity_q90",)),
        ),
        "the gap is what the network has learned",
    ),
    (
        "Top-1 of held-out rows of train",
        (("kNN", ("knn/top1",)), ("linear probe", ("probe/top1",))),
        "online, the encoder frozen meanwhile",
    ),
    (
        "Same-label share of mined negatives",
        (("same label", ("mining/same_label_rate",)),),
        "labels only watch",
    ),
    ("RankMe", (("RankMe", ("stats/rankme",)),), "effective rank; a fall is a collapse"),
    ("Learning rate", (("learning rate", ("train/lr",)),), ""),
    ("Images per second", (("images/s", ("perf/images_per_s",)),), ""),
)
"""Each chart: title, the columns of metrics.csv drawn in it (the first spelling found), what it tells."""


def points(rows: list[dict[str, str]], spellings: tuple[str, ...]) -> Points:
    """(epoch, value) of the first column that has values; cells that are empty or not finite are left out."""
    for column in spellings:
        pairs = [(number(row.get("epoch")), number(row.get(column))) for row in rows]
        found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if found:
            return found[:: max(1, len(found) // 400)]
    return []


def read_results(run: Path) -> dict[str, Any]:
    """Accuracies, by protocol."""
    found = {name: read_json(run / "eval" / f"{name}.json") for name in TITLES}
    return {name: result for name, result in found.items() if result}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none.

    Raises:
        UserError: not JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); delete it and evaluate again") from error
    return content if isinstance(content, dict) else {}


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows by column; none where there is no file."""

    def rows() -> Iterator[dict[str, str]]:
        with path.open(newline="") as file:
            yield from csv.DictReader(file)

    return list(rows()) if path.is_file() else []


def number(text: str | None) -> float:
    """NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan

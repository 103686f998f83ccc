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
    (
        "Effective rank of the bank's keys",
        (("RankMe", ("stats/rankme",)),),
        "behind the projector; a fall early on is usual, below 5% of their dimensions is a collapse",
    ),
    ("Learning rate", (("learning rate", ("train/lr",)),), ""),
    ("Images per second", (("images/s", ("perf/images_per_s",)),), ""),
)
"""Each chart: title, the columns of metrics.csv drawn in it (the first spelling found), what it tells."""


_NUMBER = (int, float)
_ACCURACY = {"value": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_BASELINE = _ACCURACY | {"gain": {"value": _NUMBER}}
SCORE = {"name": str, "encoder": _ACCURACY}
"""A number of a protocol, as ``misfit`` wants it."""
_RESULT: dict[str, Any] = {
    "scores": [SCORE | dict.fromkeys(BASELINES, _BASELINE)],
    "warnings": [str],
    "data": {
        "name": str,
        "classes": [str],
        "rows": {"train": int, "test": int},
        "fingerprint": {},
        "test_part": str,
    },
}
_CONFUSION = {"details": {"encoder": {"confusion": [[int]]}}}
_STATISTICS = dict.fromkeys(STATISTICS.keys() - {"verdict"}, (*_NUMBER, type(None)))
_STATS = {
    "scores": {"encoder": _STATISTICS | {"verdict": str}} | dict.fromkeys(BASELINES, _STATISTICS),
    "near_duplicates": {"pairs": int, "listed": int, "file": str},
}
_MINED = ("anchor_row", "anchor_key", "negative_row", "negative_key", "similarity")


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where ``value``, read from JSON, first differs from ``shape``; None where it fits.

    Args:
        value: Anything.
        shape: A dict of what must be there by name, a list of what each entry must be, or types; numbers
            must be finite.
        place: Of ``value`` in the whole.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        inner = (misfit(value.get(name), each, f"{place}.{name}") for name, each in shape.items())
        return next((found for found in inner if found), None)
    if isinstance(shape, list) and isinstance(value, list):
        inner = (misfit(each, shape[0], f"{place}[{row}]") for row, each in enumerate(value))
        return next((found for found in inner if found), None)
    fits = not isinstance(shape, dict | list) and isinstance(value, shape)
    return None if fits and not (isinstance(value, float) and not math.isfinite(value)) else place or "all"


def points(rows: list[dict[str, str]], spellings: tuple[str, ...]) -> Points:
    """(epoch, value) of the first column that has values; cells that are empty or not finite are left out."""
    for column in spellings:
        pairs = [(number(row.get("epoch")), number(row.get(column))) for row in rows]
        found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if found:
            return found[:: max(1, len(found) // 400)]
    return []


def read_results(run: Path) -> dict[str, Any]:
    """Accuracies, by protocol.

    Raises:
        UserError: a file that an evaluation did not write.
    """
    found = {}
    for name in TITLES:
        path = run / "eval" / f"{name}.json"
        if result := read_json(path):
            _require(path, misfit(result, _RESULT | _CONFUSION if name in ("linear", "knn") else _RESULT))
            _require(path, _confusion_misfit(result))
            found[name] = result
    return found


def _confusion_misfit(result: dict[str, Any]) -> str | None:
    """The place of a confusion matrix that is not of the classes."""
    if misfit(result, _CONFUSION):
        return None
    counts, classes = result["details"]["encoder"]["confusion"], result["data"]["classes"]
    square = classes and list(map(len, counts)) == [len(classes)] * len(classes)
    return None if square else ".details.encoder.confusion"


def read_stats(run: Path) -> dict[str, Any]:
    """What the stats protocol found; empty where it was not run.

    Raises:
        UserError: a file that an evaluation did not write.
    """
    path = run / "eval" / "stats.json"
    result = read_json(path)
    if result:
        _require(path, misfit(result, _STATS))
    return result


def _require(path: Path, wrong: str | None) -> None:
    if wrong:
        raise UserError(
            f"{path}: not what contrastive-eval writes, see {wrong.lstrip('.')}; delete it and evaluate again"
        )


def statistic(value: float | int | str | None) -> str:
    """As text; JSON has null for what is not finite."""
    if value is None:
        return "not finite"
    return value if isinstance(value, str) else f"{value:.3g}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none.

    Raises:
        UserError: not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); delete it and evaluate again") from error
    _require(path, misfit(content, {}))
    return dict(content)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows by column; none where there is no file. What is not UTF-8 reads as marks, as in no number.

    Raises:
        UserError: not a table.
    """

    def rows() -> Iterator[dict[str, str]]:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            yield from csv.DictReader(file)

    try:
        return list(rows()) if path.is_file() else []
    except csv.Error as error:
        raise UserError(f"{path}: not a table ({error}); move it away") from error


def read_mined(path: Path) -> list[dict[str, str]]:
    """Rows of mined.csv; none where there is no file.

    Raises:
        UserError: not such a table.
    """
    rows = read_csv(path)
    for count, row in enumerate(rows, start=1):
        cells = [row.get(name) for name in _MINED]
        if None in cells or not (row["anchor_row"] + row["negative_row"]).isdecimal():
            raise UserError(f"{path}: row {count} is not of mined negatives, {', '.join(_MINED)} are needed")
    return rows


def number(text: str | None) -> float:
    """NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan

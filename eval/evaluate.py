"""One evaluation from config to result: the protocol on the encoder and on its baselines, paired."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive.augment.views import Views
from contrastive.config import AugmentConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.files import shorten
from contrastive.data.images import SomeImages
from contrastive.data.reading import decode_all
from contrastive.encoders.encoder import Encoder
from eval.config import EvalConfig
from eval.duplicates import alike, closest_pairs, write_duplicates
from eval.features import Extractor, Network, Split, open_results, write_text
from eval.frozen import Checkpoint, resolve
from eval.leakage import warn_of_pretrained, warn_of_untrained
from eval.processes import is_first, joined
from eval.scores import Line, Scored, difference
from eval.stats import alignment, dimension_std, health

SCORES = {"linear": "eval.linear_probe", "knn": "eval.knn", "lowshot": "eval.lowshot"}
"""Where the ``score(features, config)`` of each protocol is that reads features alone."""
TRAININGS = {"linear-sgd_augmented": "eval.linear_sgd", "finetune": "eval.finetune"}
"""Where the ``score(network, config)`` of the others is."""
_NAMES = ("encoder", "raw_pixels", "random_encoder")
_NAMED = 10  # classes in the table and on stdout
_SETTINGS = ("linear", "knn", "lowshot", "finetune", "stats")

Result = dict[str, Any]


def evaluate(protocol: str, config: EvalConfig, *, encoder: Encoder | None = None) -> Result | None:
    """Run ``protocol`` and write ``<protocol>.json``; of several processes the first does, others get None.

    Args:
        protocol: Its name.
        config: Its settings.
        encoder: A fresh network of your own class, where the checkpoint is of one; see ``open_frozen``.

    Raises:
        UserError: the checkpoint, the data or a setting cannot be used, or no result can be written.
    """
    started = time.perf_counter()
    checkpoint = resolve(config.checkpoint, config.out)
    open_results(checkpoint.results)
    extractor = Extractor(config, checkpoint, labelled=protocol != "stats", encoder=encoder)
    with joined(extractor.device) as several:
        for name in extractor.modules() if several else ():
            extractor.splits(name)
    if not is_first():
        return None
    measure = _stats if protocol == "stats" else _scores
    kind = protocol
    if protocol == "linear" and config.linear.protocol != "cached":
        kind = f"linear-{config.linear.protocol}"
    measured = measure(kind, config, checkpoint, extractor)
    seconds = measured.pop("seconds") | {"total": round(time.perf_counter() - started, 3)}
    result = {"protocol": kind, **measured, **describe(protocol, config, checkpoint, extractor)}
    result |= {"seconds": seconds, "file": str(checkpoint.results / f"{kind}.json")}
    write_json(Path(result["file"]), result)
    return result


def _scores(kind: str, config: EvalConfig, checkpoint: Checkpoint, extractor: Extractor) -> Result:
    """The accuracies of a protocol, of the encoder and of what it is compared with."""
    score: Callable[[Any, EvalConfig], Scored] = import_module((SCORES | TRAININGS)[kind]).score
    scored, seconds, warnings = {}, {}, warn_of_pretrained(checkpoint.run, extractor.parts["test"])
    for name in extractor.modules():
        ready = (
            extractor.network(name) if kind in TRAININGS else extractor.features(name).to(extractor.device)
        )
        if name == "encoder":
            warnings += warn_of_untrained(ready.features if isinstance(ready, Network) else ready)
        before = time.perf_counter()
        scored[name] = score(ready, config)
        seconds[name] = round(time.perf_counter() - before, 3)
    return {
        "scores": compare({name: each.lines for name, each in scored.items()}),
        "warnings": warnings + scored["encoder"].warnings,
        "details": {name: each.details for name, each in scored.items()},
        "seconds": seconds,
    }


def _stats(kind: str, config: EvalConfig, checkpoint: Checkpoint, extractor: Extractor) -> Result:
    """Health of the features of training images, and the images that the whole data set holds twice."""
    augment = AugmentConfig()
    if checkpoint.run is not None:
        augment = load_saved(PretrainConfig, checkpoint.run / "config.yaml").augment
    splits = {name: extractor.splits(name) for name in extractor.modules()}
    known = splits["encoder"]["train"]
    shown = torch.linspace(0, len(known) - 1, min(config.stats.rows, len(known))).long()
    if len(shown) < 2:
        raise UserError(f"the training part has {len(known)} readable images, statistics need 2 or more")
    pixels, _ = decode_all(SomeImages(extractor.parts["train"], known.rows[shown]))
    views = Views(augment, extractor.data, seed=0)
    scores, details, seconds = {}, {}, {}
    for name, build in extractor.modules().items():
        before = time.perf_counter()
        features = splits[name]["train"].features[shown].to(extractor.device)
        pairs = _two_views(build().to(extractor.device), views, pixels, known.rows[shown], config.batch_size)
        scores[name] = {
            **vars(health(features)),
            "alignment": alignment(*pairs),
            "dimensions": features.shape[1],
        }
        details[name] = {"dimension_std": dimension_std(F.normalize(features)).tolist()}
        seconds[name] = round(time.perf_counter() - before, 3)
    for name in _NAMES[1:]:  # pixels, or what was never trained, are no embedding that could have collapsed
        del scores[name]["verdict"]
    verdict = scores["encoder"]["verdict"]
    file = checkpoint.results / "near_duplicates.csv"
    listed, found = _duplicates(file, config, extractor, splits)
    return {
        "scores": scores,
        "near_duplicates": {"file": str(file), "pairs": found, "listed": listed},
        "warnings": [] if verdict == "healthy" else [f"{verdict} of the features"],
        "details": details,
        "augment": asdict(augment),
        "seconds": seconds,
    }


@torch.inference_mode()
def _two_views(
    module: nn.Module, views: Views, pixels: Tensor, rows: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Unit-norm features of two random views of each image."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    for images, ids in zip(torch.split(pixels, batch_size), torch.split(rows, batch_size), strict=True):
        for features, view in zip(found, views(images.to(device), ids.to(device), 0)[:2], strict=True):
            features.append(F.normalize(module(view).float()))
    return torch.cat(found[0]), torch.cat(found[1])


def _duplicates(
    file: Path, config: EvalConfig, extractor: Extractor, splits: dict[str, dict[str, Split]]
) -> tuple[int, int]:
    """Write near_duplicates.csv; how many pairs it lists, and how many there are."""
    parts, settings = splits["encoder"], config.stats
    features = torch.cat([split.features for split in parts.values()]).to(extractor.device)
    pairs, similarity = closest_pairs(features, neighbours=settings.neighbours, least=settings.min_similarity)
    pixels = torch.cat([split.features for split in splits["raw_pixels"].values()])
    pixel_similarity = alike(pixels, pairs)
    kept = (pixel_similarity >= settings.min_pixel_similarity).nonzero()[:, 0]
    listed = kept[: settings.most_pairs]
    places = [(part, extractor.parts[part], split) for part, split in parts.items()]
    write_duplicates(file, pairs[listed], similarity[listed], pixel_similarity[listed], places)
    return len(listed), len(kept)


def compare(lines: dict[str, list[Line]]) -> list[dict[str, Any]]:
    """For each number: every representation's value, and how far the encoder is above the others."""
    rows = []
    for same in zip(*lines.values(), strict=True):
        by_name = dict(zip(lines, same, strict=True))
        ours = by_name["encoder"]
        row: dict[str, Any] = {"name": ours.name, "interval": ours.kind}
        for name, line in by_name.items():
            row[name] = {"value": line.value, "low": line.low, "high": line.high}
            if name != "encoder":
                row[name]["gain"] = difference(ours, line)
        rows.append(row)
    return rows


def describe(protocol: str, config: EvalConfig, checkpoint: Checkpoint, extractor: Extractor) -> Result:
    """Everything that produced the numbers."""
    settings = asdict(config)
    for other in {*_SETTINGS} - {protocol}:
        del settings[other]
    return {
        "checkpoint": str(checkpoint.encoder),
        "encoder_sha256": extractor.frozen.sha256,
        "encoder": extractor.frozen.about,
        "data": {
            "name": extractor.data.name,
            "root": extractor.data.root,
            "classes": list(extractor.classes),
            "rows": {part: len(images) for part, images in extractor.parts.items()},
            "unreadable": extractor.unreadable,
            "fingerprint": extractor.fingerprints,
            "test_part": _test_part(extractor),
        },
        "settings": settings,
        "device": str(extractor.device),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
    }


def _test_part(extractor: Extractor) -> str:
    if "test" not in extractor.parts:
        return "none"
    return "held out by a hash of the path" if extractor.held_out else "the data set's own"


def headline(result: Result) -> Result:
    """What goes to stdout: the numbers, without tables and settings."""
    kept = ("warnings", "checkpoint", "encoder_sha256", "near_duplicates")
    if result["protocol"] == "stats":
        numbers = {"verdict": result["scores"]["encoder"]["verdict"], "scores": result["scores"]}
    else:
        names = {row["name"]: {name: row[name]["value"] for name in _NAMES} for row in result["scores"]}
        numbers = {"top1": result["scores"][0]["encoder"]["value"], "scores": names}
    classes = result["data"]["classes"]
    return {
        "protocol": result["protocol"],
        **numbers,
        "num_classes": len(classes),
        "classes": classes[:_NAMED],
        **{name: result[name] for name in kept if name in result},
        "unreadable": sum(result["data"]["unreadable"].values()),
        "seconds": result["seconds"]["total"],
        "file": result["file"],
    }


def table(result: Result) -> str:
    """The numbers for a person; accuracies in percent."""
    rows = _stats_rows(result) if result["protocol"] == "stats" else _score_rows(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    data = result["data"]
    sizes = ", ".join(f"{rows} {part} images" for part, rows in data["rows"].items())
    classes = (
        f", {len(data['classes'])} classes ({shorten(data['classes'], _NAMED)})" if data["classes"] else ""
    )
    notes = [f"{sizes} of {data['name']}{classes}; test part: {data['test_part']}; {result['file']}"]
    if "near_duplicates" in result:
        found = result["near_duplicates"]
        notes.append(
            f"pairs of near-duplicates: {found['pairs']}, {found['listed']} listed in {found['file']}"
        )
    if missing := sum(data["unreadable"].values()):
        notes.append(f"unreadable images left out: {missing}")
    return "\n".join([*lines, *notes, *(f"warning: {text}" for text in result["warnings"])])


def _score_rows(result: Result) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "encoder", "95% interval", "raw pixels", "random encoder")]
    for score in result["scores"]:
        ours = score["encoder"]
        others = (
            f"{100 * score[name]['value']:.1f} ({100 * score[name]['gain']['value']:+.1f})"
            for name in _NAMES[1:]
        )
        interval = f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}"
        rows.append((score["name"], f"{100 * ours['value']:.1f}", interval, *others))
    return rows


def _stats_rows(result: Result) -> list[tuple[str, ...]]:
    rows = [("", *(name.replace("_", " ") for name in _NAMES))]
    for number in ("rankme", "dimensions", "alignment", "uniformity", "std", "dead", "verdict"):
        values = [result["scores"][name].get(number, "") for name in _NAMES]
        rows.append((number, *(value if isinstance(value, str) else f"{value:.4g}" for value in values)))
    return rows


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; numbers that JSON does not have become null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False)
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value

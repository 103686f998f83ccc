"""One evaluation from config to result: the protocol on the encoder and on its baselines, paired."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from eval.config import EvalConfig
from eval.features import Checkpoint, Extractor, Features, resolve, write_file
from eval.scores import Line, Scored, difference

MODULES = {"linear": "eval.linear_probe", "knn": "eval.knn", "lowshot": "eval.lowshot"}
"""Where the ``score(features, config)`` of each protocol is."""

Result = dict[str, Any]


def evaluate(protocol: str, config: EvalConfig) -> Result:
    """Run ``protocol`` and write ``<protocol>.json``.

    Raises:
        UserError: the checkpoint, the data or a setting cannot be used.
    """
    started = time.perf_counter()
    checkpoint = resolve(config.checkpoint, config.out)
    score: Callable[[Features, EvalConfig], Scored] = import_module(MODULES[protocol]).score
    extractor = Extractor(config, checkpoint)
    scored, seconds = {}, {}
    for name, features in extractor.representations().items():
        ready = features().to(extractor.device)
        before = time.perf_counter()
        scored[name] = score(ready, config)
        seconds[name] = round(time.perf_counter() - before, 3)
    result = {
        "protocol": protocol,
        "scores": compare({name: each.lines for name, each in scored.items()}),
        "warnings": scored["encoder"].warnings,
        "details": {name: each.details for name, each in scored.items()},
        **describe(protocol, config, checkpoint, extractor),
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 3)},
    }
    result["file"] = str(checkpoint.results / f"{protocol}.json")
    write_json(Path(result["file"]), result)
    return result


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
    for other in MODULES.keys() - {protocol}:
        del settings[other]
    return {
        "checkpoint": str(checkpoint.encoder),
        "encoder_sha256": extractor.encoder_sha256,
        "encoder": {
            "name": extractor.meta.encoder.name,
            "width": extractor.meta.encoder.width,
            "stem": extractor.meta.encoder.stem,
            "image_size": extractor.meta.image_size,
            **extractor.meta.extra,
        },
        "data": {
            "name": extractor.data.name,
            "root": extractor.data.root,
            "classes": list(extractor.classes),
            "rows": {part: len(images) for part, images in extractor.parts.items()},
            "unreadable": extractor.unreadable,
            "fingerprint": extractor.fingerprints,
            "test_part": "held out by a hash of the path" if extractor.held_out else "the data set's own",
        },
        "settings": settings,
        "device": str(extractor.device),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
    }


def headline(result: Result) -> Result:
    """What goes to stdout: the numbers, without tables and settings."""
    representations = ("encoder", "raw_pixels", "random_encoder")
    return {
        "protocol": result["protocol"],
        "top1": result["scores"][0]["encoder"]["value"],
        "scores": {
            row["name"]: {name: row[name]["value"] for name in representations} for row in result["scores"]
        },
        "warnings": result["warnings"],
        "checkpoint": result["checkpoint"],
        "encoder_sha256": result["encoder_sha256"],
        "unreadable": sum(result["data"]["unreadable"].values()),
        "seconds": result["seconds"]["total"],
        "file": result["file"],
    }


def table(result: Result) -> str:
    """The numbers for a person, in percent."""
    header = ("", "encoder", "95% interval", "raw pixels", "random encoder")
    rows = [header]
    for score in result["scores"]:
        ours = score["encoder"]
        rows.append(
            (
                score["name"],
                f"{100 * ours['value']:.1f}",
                f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}",
                *(
                    f"{100 * score[name]['value']:.1f} ({100 * score[name]['gain']['value']:+.1f})"
                    for name in ("raw_pixels", "random_encoder")
                ),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    data = result["data"]
    sizes = f"{data['rows']['train']} training, {data['rows']['test']} test images of {data['name']}"
    notes = [f"{sizes}; test part: {data['test_part']}; (+): gain of the encoder; {result['file']}"]
    if missing := sum(data["unreadable"].values()):
        notes.append(f"{missing} unreadable images were left out")
    return "\n".join([*lines, *notes, *(f"warning: {text}" for text in result["warnings"])])


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; numbers that JSON does not have become null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False)
    write_file(path, lambda file: file.write(text.encode() + b"\n"))


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value

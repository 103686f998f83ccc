"""Evaluate an encoder beside its baselines by one protocol, from config to result."""

import platform
import time
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from contrastive.data.dataset import GIVEN, Dataset
from contrastive.data.files import shorten
from contrastive.encoders.encoder import Encoder
from eval.config import EvalConfig
from eval.frozen import resolve
from eval.processes import is_first, joined
from eval.protocol import Page, Protocol, Result, find_protocol
from eval.results import open_results, write_json
from eval.stats_protocol import describe_duplicates
from eval.subject import Extractor

_NAMED = 10  # classes in the table and on stdout


def evaluate(
    protocol: str,
    config: EvalConfig,
    *,
    dataset: Dataset | None = None,
    encoder: Encoder | None = None,
) -> Result | None:
    """Run ``protocol``, write its result and return it; with several processes, only the first returns it.

    Args:
        protocol: A name in ``eval.registry.PROTOCOLS``.
        config: Settings of the protocol's class (``KnnEvaluation`` for ``knn``). With a plain ``EvalConfig``
            the protocol's own settings have their defaults.
        dataset: Your own images, instead of ``config.data.name``.
        encoder: A fresh network of your own class, if the checkpoint holds one; see ``open_frozen``.

    Raises:
        UserError: the checkpoint, the data or a setting cannot be used, or no result can be written.
    """
    started = time.perf_counter()
    if dataset is not None:
        config = replace(config, data=replace(config.data, name=GIVEN, root=None))
    chosen = find_protocol(protocol)
    config = _complete(config, chosen.config, protocol)
    if isinstance(chosen, Page):
        return chosen.write(config)
    location = resolve(config.checkpoint, config.out)
    open_results(location.results)
    extractor = Extractor(
        config,
        location,
        labelled=chosen.labelled,
        dataset=dataset,
        encoder=encoder,
        open_data=lambda data: chosen.open_data(data, config),
    )
    for name, images in chosen.further_parts(extractor.parts, config).items():
        extractor.add_part(name, images)
    for name, module in chosen.others(extractor, config).items():
        extractor.compare_with(name, module)
    with joined(extractor.device) as several:
        # All processes compute and cache the features; only the first scores.
        for name in extractor.modules() if several else ():
            extractor.part_features(name)
    if not is_first():
        return None
    measured = chosen.measure(extractor, config)
    seconds = measured.pop("seconds") | {"total": round(time.perf_counter() - started, 3)}
    result = {"protocol": protocol, **measured, **describe(config, extractor)}
    file = extractor.location.results / f"{protocol}{chosen.suffix(config)}.json"
    result |= {"seconds": seconds, "file": str(file)}
    write_json(Path(result["file"]), result)
    return result


def _complete(config: EvalConfig, needed: type[EvalConfig], protocol: str) -> EvalConfig:
    """Return ``config``; complete a plain EvalConfig with the protocol's default settings.

    Raises:
        ValueError: the settings are another protocol's.
    """
    if isinstance(config, needed):
        return config
    if type(config) is not EvalConfig:
        raise ValueError(
            f"{protocol}: settings are a {type(config).__name__}; give a {needed.__name__} or an EvalConfig"
        )
    return needed(**{item.name: getattr(config, item.name) for item in fields(config)})


def describe(config: EvalConfig, extractor: Extractor) -> Result:
    """Return the encoder, data, settings and versions that produced the numbers."""
    return {
        "checkpoint": str(extractor.location.encoder),
        "encoder_sha256": extractor.frozen.sha256,
        "encoder": extractor.frozen.about,
        "data": {
            "name": extractor.data.name,
            "root": extractor.data.root,
            "other": extractor.other,
            "classes": list(extractor.classes),
            "rows": {part: len(images) for part, images in extractor.parts.items()},
            "rows_are": extractor.parts["train"].noun,
            "unreadable": extractor.unreadable,
            "fingerprint": extractor.fingerprints,
            "test_part": _test_part(extractor),
        },
        "settings": asdict(config),
        "device": str(extractor.device),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
    }


def _test_part(extractor: Extractor) -> str:
    if "test" not in extractor.parts:
        return "none"
    return "held out by a hash of the path" if extractor.held_out else "the data set's own"


def headline(result: Result) -> Result:
    """Return the part of the result that is printed to stdout: the numbers, without tables and settings."""
    copied = ("warnings", "checkpoint", "encoder_sha256", "near_duplicates")
    protocol: Protocol = find_protocol(result["protocol"])
    classes = result["data"]["classes"]
    return {
        "protocol": result["protocol"],
        **protocol.numbers(result),
        "num_classes": len(classes),
        "classes": classes[:_NAMED],
        **{name: result[name] for name in copied if name in result},
        "unreadable": sum(result["data"]["unreadable"].values()),
        "seconds": result["seconds"]["total"],
        "file": result["file"],
    }


def table(result: Result) -> str:
    """Return the numbers as a text table, accuracies in percent, with notes and warnings below it."""
    protocol: Protocol = find_protocol(result["protocol"])
    rows = protocol.table(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [*protocol.notes(result), *_notes(result)]
    return "\n".join([*lines, *notes, *(f"warning: {text}" for text in result["warnings"])])


def _notes(result: Result) -> list[str]:
    data: dict[str, Any] = result["data"]
    sizes = ", ".join(f"{rows} {part} {data['rows_are']}" for part, rows in data["rows"].items())
    classes = (
        f", {len(data['classes'])} classes ({shorten(data['classes'], _NAMED)})" if data["classes"] else ""
    )
    origin = data.get("root") or data["name"]
    notes = [f"{sizes} of {origin}{classes}; test part: {data['test_part']}; {result['file']}"]
    if "near_duplicates" in result:
        notes.append(describe_duplicates(result["near_duplicates"]))
    if missing := sum(data["unreadable"].values()):
        notes.append(f"unreadable {data['rows_are']} left out: {missing}")
    return notes

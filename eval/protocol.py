"""Define an evaluation protocol: its settings, what it measures, and how its result is shown."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from contrastive.config import DataConfig
from contrastive.data.dataset import Dataset, open_dataset
from contrastive.data.images import Images
from eval.config import EvalConfig
from eval.features import Features
from eval.leakage import find_pretrained, warn_of_untrained
from eval.registry import PROTOCOLS
from eval.scores import Line, Scored, difference
from eval.subject import Extractor, Network

log = logging.getLogger(__name__)

Result = dict[str, Any]
"""Result of a protocol, as written to JSON."""
Row = tuple[str, ...]
"""Cells of one line of the table."""


@dataclass(frozen=True)
class Protocol(ABC):
    """Measure an encoder and its baselines on one data set.

    Attributes:
        config: Class of the settings: EvalConfig, or a subclass with a field for those of the protocol alone.
    """

    config: type[EvalConfig]

    labelled: ClassVar[bool | None] = True
    """Whether the protocol needs labels. If not, the training part is all images that pretraining sees; None
    uses labels if there are some."""

    def open_data(self, data: DataConfig, config: Any) -> Dataset:
        """Open the images; by default those of ``data.name``.

        Raises:
            UserError: they cannot be opened.
        """
        return open_dataset(data)

    def further_parts(self, parts: Mapping[str, Images], config: Any) -> dict[str, Images]:
        """Return further parts to compute features of, by the parts that are there; none by default."""
        return {}

    def suffix(self, config: Any) -> str:
        """Return the end of its files' names, of settings that ask another question; "" by default."""
        return ""

    def others(self, extractor: Extractor, config: Any) -> dict[str, nn.Module]:
        """Return further networks to compare with, see ``Extractor.compare_with``; none by default.

        Raises:
            UserError: one of them cannot be used.
        """
        return {}

    @abstractmethod
    def measure(self, extractor: Extractor, config: Any) -> Result:
        """Return ``scores``, ``warnings``, ``details`` and ``seconds`` of each part, ready for JSON."""

    @abstractmethod
    def numbers(self, result: Result) -> Result:
        """Return the part of ``result["scores"]`` that is printed to stdout."""

    @abstractmethod
    def table(self, result: Result) -> list[Row]:
        """Return ``result["scores"]`` as rows of text, the names of the columns first."""

    def notes(self, result: Result) -> list[str]:
        """Return lines that explain the table; none by default."""
        return []


@dataclass(frozen=True)
class Scoring(Protocol):
    """Score the encoder and each baseline with one function; the scores are accuracies.

    Attributes:
        score: Function of ``Features`` (or ``Network``) and settings of the class ``config`` to ``Scored``.
        needs_network: Whether ``score`` takes a ``Network``: it computes features of other views than the
            centre view, or trains the network. Otherwise it takes ``Features``.
        title: Heading of the scores in a report; empty is the protocol's name.
        parts: What a report calls the images that are known, and those that are scored.
        variants: What ``suffix`` returns beside "" (``-mean``), with words for it.
    """

    score: Callable[[Any, Any], Scored]
    needs_network: bool = False
    title: str = ""
    parts: tuple[str, str] = ("training", "test")
    variants: Mapping[str, str] = field(default_factory=dict)

    @override
    def measure(self, extractor: Extractor, config: Any) -> Result:
        scored, seconds = {}, {}
        pretrained, warnings = dict[str, int](), list[str]()
        for name in extractor.modules():
            subject, features = self._subject(extractor, name)
            if name == "encoder":
                run, test, rows = extractor.location.run, extractor.parts["test"], features.test.rows.tolist()
                pretrained, warnings = find_pretrained(run, test, extractor.data, rows)
                warnings += warn_of_untrained(features)
            before = time.perf_counter()
            scored[name] = self.score(subject, config)
            seconds[name] = round(time.perf_counter() - before, 3)
            if config.progress:
                first, title = scored[name].lines[0], name.replace("_", " ")
                log.info("%s: %s %.1f%%, %.1f s", title, first.name, 100 * first.value, seconds[name])
        return {
            "scores": compare({name: each.lines for name, each in scored.items()}),
            "warnings": warnings + warnings_of(scored),
            "pretrained": pretrained,
            "details": {name: each.details for name, each in scored.items()},
            "seconds": seconds,
        }

    def _subject(self, extractor: Extractor, name: str) -> tuple[Features | Network, Features]:
        if self.needs_network:
            network = extractor.network(name)
            return network, network.features
        features = extractor.features(name).to(extractor.device)
        return features, features

    @override
    def numbers(self, result: Result) -> Result:
        scores = {
            row["name"]: {name: row[name]["value"] for name in representations(row)}
            for row in result["scores"]
        }
        return {"top1": result["scores"][0]["encoder"]["value"], "scores": scores}

    @override
    def table(self, result: Result) -> list[Row]:
        baselines = representations(result["scores"][0])[1:]
        rows: list[Row] = [("", "encoder", "95% interval", *(name.replace("_", " ") for name in baselines))]
        for score in result["scores"]:
            ours = score["encoder"]
            others = (
                f"{100 * score[name]['value']:.1f} ({100 * score[name]['gain']['value']:+.1f})"
                for name in baselines
            )
            interval = f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}"
            rows.append((score["name"], f"{100 * ours['value']:.1f}", interval, *others))
        return rows

    @override
    def notes(self, result: Result) -> list[str]:
        kinds = dict.fromkeys(score["interval"] for score in result["scores"])
        return [f"95% intervals: {'; '.join(kinds)}"] if kinds else []


@dataclass(frozen=True)
class Page:
    """Write a page of existing results; measure nothing.

    Attributes:
        config: Class of the settings.
        write: Function that writes the page and returns what is printed to stdout.
    """

    config: type[EvalConfig]
    write: Callable[[Any], Result]


def find_protocol(name: str) -> Any:
    """Return the Protocol or Page called ``name``, which may have a suffix of its ``variants``."""
    module, _, attribute = PROTOCOLS[name if name in PROTOCOLS else name.partition("-")[0]].partition(":")
    return getattr(import_module(module), attribute)


def accuracy_titles() -> dict[str, str]:
    """Return the protocols that score accuracies, and their variants, with their headings in a report."""
    titles = {}
    for name, each in ((name, find_protocol(name)) for name in PROTOCOLS):
        if isinstance(each, Scoring):
            titles[name] = title = each.title or name
            titles |= {f"{name}{suffix}": f"{title}, {words}" for suffix, words in each.variants.items()}
    return titles


def warnings_of(scored: dict[str, Scored]) -> list[str]:
    """Return the warnings of all representations; one that is not of all begins with those it is of."""
    told: dict[str, list[str]] = {}
    for name, each in scored.items():
        for text in each.warnings:
            told.setdefault(text, []).append(name.replace("_", " "))
    return [
        text if len(names) == len(scored) else f"{', '.join(names)}: {text}" for text, names in told.items()
    ]


def compare(lines: dict[str, list[Line]]) -> list[Result]:
    """Return a row for each number: the value under every representation, and the encoder's gain over it."""
    rows = []
    for same in zip(*lines.values(), strict=True):
        by_name = dict(zip(lines, same, strict=True))
        ours = by_name["encoder"]
        row: Result = {"name": ours.name, "interval": ours.kind}
        for name, line in by_name.items():
            row[name] = {"value": line.value, "low": line.low, "high": line.high}
            if name != "encoder":
                row[name]["gain"] = difference(ours, line)
        rows.append(row)
    return rows


def representations(row: Result) -> list[str]:
    """Return the names in a row of ``compare``: the encoder, then what it is compared with."""
    return [name for name, number in row.items() if isinstance(number, dict)]

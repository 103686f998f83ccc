"""Answer "was it worth it?": the encoder beside all baselines, with many labels, few, or none."""

import os
import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from contrastive.config import DataConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.encoded import FileImages
from contrastive.data.files import find_layout
from contrastive.data.images import Images
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.weights import load_weights
from eval import knn, linear_probe, lowshot
from eval.config import SeededEvaluation
from eval.features import Features, PartFeatures
from eval.frozen import seeded
from eval.knn import KnnConfig, KnnEvaluation
from eval.leakage import describe_pretrained
from eval.linear_probe import LinearEvaluation
from eval.lowshot import LowshotConfig, LowshotEvaluation
from eval.protocol import Result, Row, Scoring, representations
from eval.rival import open_rival
from eval.run_files import describe_epochs, epochs_done
from eval.scores import Line, Scored, accuracy_line, difference
from eval.stats import alignment, found_again, health
from eval.stats_protocol import TITLES, StatsConfig, find_duplicates, warn_of_shared
from eval.subject import Extractor
from eval.two_views import ViewSampler
from eval.verdict import judge, judge_without_labels, title
from memory_bank.config import check_range

_MOST_COMPARED = 10_000
"""Images that are compared with each other in at most some seconds."""


@dataclass
class WorthConfig:
    """Settings of the ``worth`` protocol; the protocols that it runs have their default settings.

    Attributes:
        against: Further networks to compare with, frozen: anything that ``checkpoint`` takes, e.g.
            ``torchvision:resnet18:FILE``. They take the encoder's images, at its size, normalised as they
            need. If the run started from a file of weights, these are compared without being named.
        labels_per_class: Labelled images of each class, ascending; numbers above the size of the smallest
            class are left out, with a warning.
        k: Neighbours that vote; fewer if there are fewer training images.
        rows: Without labels: images, spread evenly over the training part, whose two views are compared.
    """

    against: list[str] = field(default_factory=list)
    labels_per_class: list[int] = field(default_factory=lambda: [1, 5, 10])
    k: int = 20
    rows: int = 4096

    def __post_init__(self) -> None:
        for count in self.labels_per_class:
            check_range("worth.labels_per_class", count, 1)
        if sorted({*self.labels_per_class}) != self.labels_per_class:
            raise ValueError(f"worth.labels_per_class={self.labels_per_class}: give ascending numbers")
        check_range("worth.k", self.k, 1)
        check_range("worth.rows", self.rows, 2)


@dataclass
class WorthEvaluation(SeededEvaluation):
    """Settings of the ``worth`` protocol.

    Attributes:
        worth: See WorthConfig. ``seeds`` is the number of draws of few labels.
    """

    worth: WorthConfig = field(default_factory=WorthConfig)


def score(features: Features, config: WorthEvaluation) -> Scored:
    """Return the top-1 of the linear probe at all labels, of kNN, and of probes from few labels.

    With one label a class at most, the probe cannot choose its settings, and is left out with a warning.
    """
    own, checkpoint = config.worth, config.checkpoint
    counts, warnings = _affordable(features, own.labels_per_class)
    lines, details = [], {}
    if int(torch.bincount(features.train.labels).max()) > 1:
        probed = linear_probe.score(features, LinearEvaluation(checkpoint))
        lines.append(replace(probed.lines[0], name="linear probe"))
        details, warnings = probed.details, [*probed.warnings, *warnings]
    else:
        warnings.append("no linear probe at all labels: no class has 2, which choosing its settings needs")
    k = min(own.k, len(features.train))
    voted = knn.score(features, KnnEvaluation(checkpoint, knn=KnnConfig([k])))
    lines.append(replace(voted.lines[0], name=f"kNN k={k}"))
    if counts:
        few = LowshotEvaluation(checkpoint, seeds=config.seeds, lowshot=LowshotConfig(counts, []))
        names = [f"{count} label{'s' if count > 1 else ''} a class" for count in counts]
        drawn = lowshot.score(features, few).lines
        lines += [replace(line, name=name) for line, name in zip(drawn, names, strict=True)]
    return Scored(lines, details, warnings)


def _affordable(features: Features, counts: list[int]) -> tuple[list[int], list[str]]:
    """Return the numbers of labels that every class has, and a warning about the others."""
    sizes = torch.bincount(features.train.labels, minlength=len(features.classes))
    least = int(sizes[sizes > 0].min())
    allowed, others = ([n for n in counts if (n <= least) == kept] for kept in (True, False))
    name = features.classes[sizes.tolist().index(least)]
    few = f"worth.labels_per_class={others}: left out, class {name!r} has {least} training images"
    return allowed, [few] if others else []


class Worth(Scoring):
    """Score as above, compare with the starting weights too, and add a sentence; work without labels too."""

    labelled: ClassVar[bool | None] = None

    @override
    def others(self, extractor: Extractor, config: WorthEvaluation) -> dict[str, nn.Module]:
        found = _starting_weights(extractor)
        for text in config.worth.against:
            if text in {*found, *extractor.modules()}:
                raise UserError(f"worth.against: {text} is compared with already; leave it out")
            found[text] = open_rival("worth.against", text, extractor)
        return found

    @override
    def measure(self, extractor: Extractor, config: WorthEvaluation) -> Result:
        if extractor.labelled:
            result = super().measure(extractor, config)
            pretrained = describe_pretrained(result["pretrained"], extractor.parts["test"].noun)
            verdict = judge(result["scores"], _largest_share(result), pretrained)
            result["warnings"] += _warn_of_duplicates(
                extractor.part_features("encoder"), extractor.part_features("raw_pixels"), extractor.device
            )
        else:
            result = _measure_without_labels(extractor, config)
            labels = _class_folders(extractor.parts["train"], extractor.data)
            verdict = judge_without_labels(
                result["scores"], result["details"]["images"], labels, own=not extractor.other
            )
        result["warnings"] += _missing_start(extractor) + _unfinished(extractor)
        return result | vars(verdict)

    @override
    def numbers(self, result: Result) -> Result:
        shown = {name: result[name] for name in ("answer", "sentence")}
        return shown | (super().numbers(result) if _has_labels(result) else {"scores": result["scores"]})

    @override
    def table(self, result: Result) -> list[Row]:
        """Return a row for each network, the encoder last."""
        scores = result["scores"]
        if not _has_labels(result):
            names = [*[name for name in scores if name != "encoder"], "encoder"]
            signals: list[Row] = [(title(name), *_signals(scores[name])) for name in names]
            return [("", "second views found, %", TITLES["rankme"]), *signals]
        ours, *baselines = representations(scores[0])
        lines = [(title(name), *(_cell(row[name]) for row in scores)) for name in [*baselines, ours]]
        return [("", *(row["name"] for row in scores)), *lines]

    @override
    def notes(self, result: Result) -> list[str]:
        if not _has_labels(result):
            return [
                "a second view is found if it is closer to the first than all other images' second views; in "
                "brackets ours has its 95% interval, a baseline has what ours gains over it, with the 95% "
                "interval of that gain; contrastive-eval stats has more of the features",
                result["sentence"],
            ]
        return [
            "top-1 in %; in brackets: for ours its 95% interval, for a baseline what ours gains over it and "
            "the 95% interval of that gain; of gains of 0, one interval in 40 lies above 0 by chance",
            _chance(result),
            *super().notes(result),
            result["sentence"],
        ]


PROTOCOL = Worth(WorthEvaluation, score, title="Was it worth it")


def _chance(result: Result) -> str:
    """Say what guessing scores: of all classes alike, or always the one with the most test images."""
    classes = len(result["data"]["classes"])
    largest = _largest_share(result)
    always = "" if largest is None else f", always naming the largest class {100 * largest:.1f}%"
    return f"chance: guessing among {classes} classes has {100 / classes:.1f}%{always}"


def _largest_share(result: Result) -> float | None:
    """Return the share of the test images that are of the largest class; None without a linear probe."""
    confusion = result["details"]["encoder"].get("confusion")
    counts = [sum(line) for line in confusion or ()]
    return max(counts) / sum(counts) if counts else None


def _has_labels(result: Result) -> bool:
    return isinstance(result["scores"], list)


def _cell(number: dict[str, Any]) -> str:
    value = f"{100 * number['value']:.1f}"
    if (gain := number.get("gain")) is None:
        return f"{value} ({_percent(number['low'])} to {_percent(number['high'])})"
    return f"{value} ({100 * gain['value']:+.1f}: {_percent(gain['low'])} to {_percent(gain['high'])})"


def _percent(value: float | None) -> str:
    """Format an end of an interval; None, in JSON, and infinity are unknown."""
    return "?" if value is None or abs(value) == float("inf") else f"{100 * value:.1f}"


def _signals(found: dict[str, Any]) -> tuple[str, str]:
    """Format what a network has without labels: second views found, and its effective rank."""
    gain = {end: found[name] for end, name in _GAIN.items()} if "gain" in found else None
    number = {"value": found["retrieval"], "low": found["retrieval_low"], "high": found["retrieval_high"]}
    return _cell(number | ({"gain": gain} if gain else {})), f"{found['rankme']:.1f} of {found['dimensions']}"


def _measure_without_labels(extractor: Extractor, config: WorthEvaluation) -> Result:
    """Measure how well two views of an image are matched, and the health of the features."""
    sampler = ViewSampler(extractor, config.worth.rows, config.batch_size)
    scores: dict[str, Any] = {}
    lines: dict[str, Line] = {}
    seconds = {}
    for name in extractor.modules():
        before = time.perf_counter()
        features = sampler.features(name)
        line = accuracy_line("retrieval", found_again(features.first, features.second)[None])
        gain = difference(lines.setdefault("encoder", line), line)  # the encoder is the first
        scores[name] = {
            "retrieval": line.value,
            "retrieval_low": line.low,
            "retrieval_high": line.high,
            **({} if name == "encoder" else {_GAIN[end]: value for end, value in gain.items()}),
            **vars(health(features.centre)),
            "alignment": alignment(features.first, features.second),
            "dimensions": features.centre.shape[1],
        }
        if name != "encoder":  # not trained here, so it cannot have collapsed here
            del scores[name]["verdict"]
        seconds[name] = round(time.perf_counter() - before, 3)
    return {"scores": scores, "details": {"images": len(features.first)}, "warnings": [], "seconds": seconds}


def _class_folders(images: Images, data: DataConfig) -> str:
    """Say how folders that are not read as classes would be; empty if there are none."""
    if data.name != "images" or not isinstance(images, FileImages):
        return ""
    layout = find_layout(Path(os.fsdecode(images.root)))
    if not layout.may_be_classes:
        return ""
    loose = len(layout.loose)
    move = f"move the {loose} images that lie in none of them there or away, and " if loose else ""
    return (
        f"{data.root} has {len(layout.folders)} folders of images; if they are classes, {move}add "
        f"data.name=imagefolder {shlex.quote(f'data.root={data.root}')}."
    )


def _warn_of_duplicates(
    encoded: dict[str, PartFeatures], pixels: dict[str, PartFeatures], device: torch.device
) -> list[str]:
    """Warn of near-duplicates on both sides of the split, if the images are few enough to look quickly."""
    if sum(map(len, encoded.values())) > _MOST_COMPARED:
        return []
    return warn_of_shared(find_duplicates(StatsConfig(), device, encoded, pixels).by_parts)


_GAIN = {"value": "gain", "low": "gain_low", "high": "gain_high"}


def _unfinished(extractor: Extractor) -> list[str]:
    """Warn if the run was stopped, or still goes on, and how far it has come is known."""
    run = extractor.location.run
    if run is None or (run / "summary.json").is_file() or epochs_done(run) is None:
        return []
    schedule = load_saved(PretrainConfig, run / "config.yaml").schedule
    return [
        f"the run has done {describe_epochs(run, schedule)}; the command that began it continues it, and "
        "its answer may then be another"
    ]


def _start(extractor: Extractor) -> str | None:
    """Return ``encoder.weights`` of the run; None if it started from random weights, or is not known."""
    run = extractor.location.run
    return None if run is None else load_saved(PretrainConfig, run / "config.yaml").encoder.weights


def _starting_weights(extractor: Extractor) -> dict[str, nn.Module]:
    """Load the weights that the run started from, if they are a file; published ones might be downloaded."""
    weights = _start(extractor)
    if weights is None or not Path(weights).is_file():
        return {}
    with seeded(0):
        module = extractor.frozen.build_random()
    assert isinstance(module, Encoder)
    load_weights(module, weights)
    return {"starting_weights": module}


def _missing_start(extractor: Extractor) -> list[str]:
    """Warn if the run started from weights that are not compared because they are no file here."""
    weights = _start(extractor)
    if weights is None or Path(weights).is_file():
        return []
    return [
        f"the run started from encoder.weights={weights}, which is no file here, so it is not compared with; "
        "add it as worth.against=[torchvision:MODEL:FILE], or timm:, or without FILE to download it"
    ]

"""Check the health of the features, and list duplicated images of the data; needs no labels."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from typing_extensions import override

from eval.config import EvalConfig
from eval.duplicates import alike, closest_pairs, write_duplicates
from eval.features import PartFeatures
from eval.protocol import Protocol, Result, Row
from eval.stats import alignment, dimension_std, health
from eval.subject import Extractor
from eval.two_views import ViewSampler
from memory_bank.config import check_range

TITLES = {
    "verdict": "verdict",
    "rankme": "effective rank (RankMe)",
    "dimensions": "of dimensions",
    "alignment": "alignment of two views, 0 is best",
    "uniformity": "uniformity, -4 is best",
    "std": "spread, 1 is isotropic",
    "dead": "share of dead dimensions",
}
"""Titles of the numbers of ``Health``, of the alignment and of the number of dimensions."""


@dataclass
class StatsConfig:
    """Settings of the health statistics and of the search for duplicated images.

    Attributes:
        rows: Images, spread evenly over the training part, of which two views are compared.
        min_similarity: Least cosine of two images' mean-centered features if the pair is listed in
            near_duplicates.csv.
        min_pixel_similarity: Least similarity of their pixels (``eval.duplicates.alike``), averaged down to
            ``baselines.raw_size``. Of 120 parts of two photographs all stay above 0.97 if recompressed (JPEG
            60) or halved, 98% if cropped by 4%; of 126 plots on white 98%, 100% and 69%.
        neighbours: Number of closest images compared with each image.
        most_pairs: Largest number of pairs listed, the most similar first.
    """

    rows: int = 4096
    min_similarity: float = 0.9
    min_pixel_similarity: float = 0.97
    neighbours: int = 5
    most_pairs: int = 1000

    def __post_init__(self) -> None:
        check_range("stats.rows", self.rows, 2)
        check_range("stats.min_similarity", self.min_similarity, -1, 1)
        check_range("stats.min_pixel_similarity", self.min_pixel_similarity, -1, 1)
        check_range("stats.neighbours", self.neighbours, 1)
        check_range("stats.most_pairs", self.most_pairs, 0)


@dataclass
class StatsEvaluation(EvalConfig):
    """Settings of the ``stats`` protocol.

    Attributes:
        stats: See StatsConfig.
    """

    stats: StatsConfig = field(default_factory=StatsConfig)


class Stats(Protocol):
    """Measure the spread of features, the distance of two views, and near-duplicates in all parts."""

    labelled: ClassVar[bool | None] = False

    @override
    def measure(self, extractor: Extractor, config: StatsEvaluation) -> Result:
        features_of = {name: extractor.part_features(name) for name in extractor.modules()}
        sampler = ViewSampler(extractor, config.stats.rows, config.batch_size)
        scores, details, seconds = _health(sampler, extractor)
        for name in scores.keys() - {"encoder"}:  # not trained, so they cannot have collapsed
            del scores[name]["verdict"]
        verdict = scores["encoder"]["verdict"]
        file = extractor.location.results / "near_duplicates.csv"
        listed, pairs = _list_duplicates(file, config.stats, extractor, features_of)
        return {
            "scores": scores,
            "near_duplicates": {"file": str(file), "pairs": pairs, "listed": listed},
            "warnings": [] if verdict == "healthy" else [f"{verdict} of the features"],
            "details": details,
            "augment": asdict(sampler.augment),
            "seconds": seconds,
        }

    @override
    def numbers(self, result: Result) -> Result:
        return {"verdict": result["scores"]["encoder"]["verdict"], "scores": result["scores"]}

    @override
    def table(self, result: Result) -> list[Row]:
        scores = result["scores"]
        rows: list[Row] = [("", *(name.replace("_", " ") for name in scores))]
        for number, title in TITLES.items():
            rows.append((title, *(_text(of_one.get(number, "")) for of_one in scores.values())))
        return rows


def describe_duplicates(pairs: Result) -> str:
    """Describe ``near_duplicates`` of a result: how many pairs there are, and where they are listed."""
    count, listed = pairs["pairs"], pairs["listed"]
    if not count:
        return "no near-duplicates"
    where = "in" if listed == count else f"the {listed:,} closest in"
    return f"{count:,} pair{'s' * (count > 1)} of near-duplicates, {where} {pairs['file']}"


def _text(value: int | float | str | None) -> str:
    """Format a statistic; null in JSON is a value that is not finite."""
    if value is None:
        return "not finite"
    return value if isinstance(value, str) else f"{value:.4g}"


PROTOCOL = Stats(StatsEvaluation)


def _health(sampler: ViewSampler, extractor: Extractor) -> tuple[Result, Result, Result]:
    """Return scores, details and seconds of the encoder and of each baseline."""
    scores: dict[str, Any] = {}
    details, seconds = {}, {}
    for name in extractor.modules():
        before = time.perf_counter()
        features = sampler.features(name)
        scores[name] = {
            **vars(health(features.center)),
            "alignment": alignment(features.first, features.second),
            "dimensions": features.center.shape[1],
        }
        details[name] = {"dimension_std": dimension_std(F.normalize(features.center)).tolist()}
        seconds[name] = round(time.perf_counter() - before, 3)
    return scores, details, seconds


def _list_duplicates(
    file: Path, settings: StatsConfig, extractor: Extractor, features_of: dict[str, dict[str, PartFeatures]]
) -> tuple[int, int]:
    """Write near_duplicates.csv; return how many pairs it lists, and how many there are."""
    parts = features_of["encoder"]
    features = torch.cat([part.features for part in parts.values()]).to(extractor.device)
    pairs, similarity = closest_pairs(features, neighbours=settings.neighbours, least=settings.min_similarity)
    pixels = torch.cat([part.features for part in features_of["raw_pixels"].values()])
    pixel_similarity = alike(pixels, pairs)
    duplicates = (pixel_similarity >= settings.min_pixel_similarity).nonzero()[:, 0]
    listed = duplicates[: settings.most_pairs]
    sources = [(part, extractor.parts[part], known) for part, known in parts.items()]
    write_duplicates(file, pairs[listed], similarity[listed], pixel_similarity[listed], sources)
    return len(listed), len(duplicates)

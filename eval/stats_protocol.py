"""Check the health of the features, and list duplicated images of the data; needs no labels."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
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
    "rankme": "effective rank of the training features (RankMe)",
    "dimensions": "of dimensions",
    "alignment": "alignment of two views, collapsed features have 0",
    "uniformity": "uniformity, -4 is spread evenly, 0 collapsed",
    "std": "spread, 1 is isotropic",
    "dead": "share of dead dimensions",
}
"""Titles of the numbers of ``Health``, of the alignment and of the number of dimensions."""


@dataclass
class StatsConfig:
    """Settings of the health statistics and of the search for duplicated images.

    Attributes:
        rows: Images, spread evenly over the training part, of which two views are compared.
        min_similarity: Least cosine of two images' mean-centred features if the pair is listed in
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
        encoded, pixels = features_of["encoder"], features_of["raw_pixels"]
        found = find_duplicates(config.stats, extractor.device, encoded, pixels)
        listed = min(len(found.pairs), config.stats.most_pairs)
        sources = [(part, extractor.parts[part], known) for part, known in encoded.items()]
        write_duplicates(
            file, found.pairs[:listed], found.similarity[:listed], found.pixel_similarity[:listed], sources
        )
        return {
            "scores": scores,
            "near_duplicates": {
                "file": str(file),
                "pairs": len(found.pairs),
                "listed": listed,
                "by_parts": found.by_parts,
            },
            "warnings": warn_of_collapse(verdict, own=not extractor.other) + warn_of_shared(found.by_parts),
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

    @override
    def notes(self, result: Result) -> list[str]:
        rows = result["settings"]["stats"]["rows"]
        return [f"of the features of training images, {rows:,} at most, evenly spread, before the projector"]


def describe_duplicates(pairs: Result) -> str:
    """Describe ``near_duplicates`` of a result: how many pairs there are, and where they are listed."""
    count, listed = pairs["pairs"], pairs["listed"]
    if not count:
        return "no near-duplicates"
    where = "in" if listed == count else f"the {listed:,} closest in"
    parts = pairs.get("by_parts", {})  # not in results of earlier versions
    each = f" ({', '.join(f'{number:,} {part}' for part, number in parts.items())})" if len(parts) > 1 else ""
    return f"{count:,} pair{'s' * (count > 1)} of near-duplicates{each}, {where} {pairs['file']}"


def warn_of_collapse(verdict: str, own: bool) -> list[str]:
    """Warn of features that are not healthy; on images other than the run's own these may be the cause."""
    if verdict == "healthy":
        return []
    cause = (
        "" if own else ": these images are not the run's own, and may be unlike any that it was trained on"
    )
    return [f"{verdict} of the features{cause}"]


def warn_of_shared(by_parts: dict[str, int]) -> list[str]:
    """Warn of near-duplicates that lie on both sides of a split, by the number of pairs of each two parts."""
    count = by_parts.get("train-test", 0)
    pairs = f"{count:,} pair{'s' * (count > 1)}"
    return [
        f"{pairs} of near-duplicates with one image in the training and one in the test part, which "
        "neighbours find again, those of raw pixels above all, so scores can be too high; contrastive-eval "
        "stats lists them: keep one of each, or make folders train and test of your own"
    ] * (count > 0)


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
            **vars(health(features.centre)),
            "alignment": alignment(features.first, features.second),
            "dimensions": features.centre.shape[1],
        }
        details[name] = {"dimension_std": dimension_std(F.normalize(features.centre)).tolist()}
        seconds[name] = round(time.perf_counter() - before, 3)
    return scores, details, seconds


@dataclass(frozen=True)
class Duplicates:
    """Near-duplicates, the most similar first.

    Attributes:
        pairs: Rows of the features of all parts, one part after the other.
        similarity: Similarity of each pair to the encoder.
        pixel_similarity: Similarity of each pair's pixels.
        by_parts: Number of pairs with images in the same two parts, as ``train-test``; none are left out.
    """

    pairs: Int[Tensor, "p 2"]
    similarity: Float[Tensor, " p"]
    pixel_similarity: Float[Tensor, " p"]
    by_parts: dict[str, int]


def find_duplicates(
    settings: StatsConfig,
    device: torch.device,
    encoded: dict[str, PartFeatures],
    pixels: dict[str, PartFeatures],
) -> Duplicates:
    """Find near-duplicates among all parts by features of the encoder, then by pixels."""
    features = torch.cat([part.features for part in encoded.values()]).to(device)
    pairs, similarity = closest_pairs(features, neighbours=settings.neighbours, least=settings.min_similarity)
    pixel_similarity = alike(torch.cat([part.features for part in pixels.values()]), pairs)
    same = (pixel_similarity >= settings.min_pixel_similarity).nonzero()[:, 0]
    names = [name for name, part in encoded.items() for _ in range(len(part))]
    counts = Counter(f"{names[first]}-{names[second]}" for first, second in pairs[same].tolist())
    return Duplicates(pairs[same], similarity[same], pixel_similarity[same], dict(counts))

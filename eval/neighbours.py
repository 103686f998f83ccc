"""Show what an encoder takes for alike: the images nearest to some others, beside those by its baselines."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from contrastive.config import UserError
from contrastive.data.images import Images
from eval.config import EvalConfig
from eval.duplicates import are_duplicates
from eval.features import PartFeatures
from eval.leakage import find_pretrained, warn_of_untrained
from eval.pages.page import card, page, section, table
from eval.pages.strip import strip, tile
from eval.protocol import Result, Row, Scoring, compare
from eval.ranking import Gallery, People, Ranking, Search
from eval.results import write_text
from eval.scores import Line, Scored, t_interval
from eval.stats_protocol import StatsConfig
from eval.subject import Extractor
from memory_bank.config import check_range

_TITLE = "Neighbours of the same class"
_KINDS = {
    "drawn": ("Drawn at random", "Are they alike in what matters to you?"),
    "isolated": (
        "The most isolated",
        "Least similar to their nearest: rare things, or what has no place here.",
    ),
}
_NOTE = (
    "In each row the left image is the query, and right of it are the nearest other images by the cosine of "
    "their features, which stands below them; cosines of two networks do not compare. “copy” marks "
    "near-duplicates of the query, by the rule of stats."
)
_FRAME_NOTE = " A green frame: the query's class; a red one: another."
_SCORE_NOTE = "Of all test images, in percent; in brackets: the encoder's gain over each baseline."
_FRAMES: dict[bool | None, Literal["", "right", "wrong"]] = {None: "", True: "right", False: "wrong"}


@dataclass
class NeighboursConfig:
    """Settings of the page of nearest neighbours.

    Attributes:
        queries: Number of images whose neighbours are shown: half of them drawn, half the most isolated,
            those least similar to their nearest.
        k: Number of neighbours of each; the score is of as many.
        seed: Decides which are drawn.
    """

    queries: int = 12
    k: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("neighbours.queries", self.queries, 1, 200)
        check_range("neighbours.k", self.k, 1, 100)
        check_range("neighbours.seed", self.seed, 0, 2**32 - 1)


@dataclass
class NeighboursEvaluation(EvalConfig):
    """Settings of the ``neighbours`` protocol.

    Attributes:
        neighbours: See NeighboursConfig.
    """

    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)


class Neighbours(Scoring):
    """Draw the nearest images of some others into ``neighbours.html``; with labels, count the right ones.

    With labels and a test part, test images look among training images, otherwise training images among each
    other.
    """

    labelled: ClassVar[bool | None] = None

    @override
    def measure(self, extractor: Extractor, config: NeighboursEvaluation) -> Result:
        asking = "test" if extractor.labelled else "train"
        features, found, details, seconds = {}, {}, {}, {}
        for name in extractor.modules():
            features[name] = extractor.part_features(name)
            before = time.perf_counter()
            held, asked = (features[name][part] for part in ("train", asking))
            found[name], details[name] = find_nearest(held, asked, config.neighbours.k)
            seconds[name] = round(time.perf_counter() - before, 3)
        lines, pretrained, warnings = {}, dict[str, int](), list[str]()
        if extractor.labelled:
            lines = {name: self.score(ranking, config).lines for name, ranking in found.items()}
            run, test, rows = (
                extractor.location.run,
                extractor.parts["test"],
                features["encoder"]["test"].rows,
            )
            pretrained, warnings = find_pretrained(run, test, extractor.data, rows.tolist())
            warnings += warn_of_untrained(extractor.features("encoder"))
        file = extractor.location.results / "neighbours.html"
        result: Result = {
            "scores": compare(lines) if lines else [],
            "warnings": warnings,
            "pretrained": pretrained,
            "details": details,
            "queries": _queries(extractor, features, found, asking, config.neighbours),
            "page": str(file),
            "seconds": seconds,
        }
        write_text(file, _page(extractor, result, self.table(result)))
        return result

    @override
    def numbers(self, result: Result) -> Result:
        scores = super().numbers(result) if result["scores"] else {}
        return {**scores, "page": result["page"]}

    @override
    def table(self, result: Result) -> list[Row]:
        return super().table(result) if result["scores"] else []

    @override
    def notes(self, result: Result) -> list[str]:
        return [*super().notes(result), f"page: {result['page']}"]


def score(found: Ranking, _: NeighboursEvaluation) -> Scored:
    """Return the share of the nearest that have the query's class, with a t interval over the queries."""
    shares = found.right.sum(1) / found.valid.sum(1)
    low, high = t_interval(shares.double())
    name, kind = f"right of {found.rows.shape[1]} nearest", f"t over {len(shares)} test images"
    return Scored([Line(name, float(shares.mean()), max(0.0, low), min(1.0, high), kind, shares[None])], {})


PROTOCOL = Neighbours(NeighboursEvaluation, score, title=_TITLE)


def find_nearest(held: PartFeatures, asked: PartFeatures, k: int) -> tuple[Ranking, dict[str, Any]]:
    """Rank the ``k`` images nearest to each image; it is not among them itself.

    Args:
        held: Images to look among.
        asked: Images to look for; the same object looks for the neighbours of its own.
        k: Number of neighbours; fewer are found if there are no more.

    Returns:
        The rankings, and how they were found.

    Raises:
        UserError: there is no other image.
    """
    if len(held) <= (held is asked):
        raise UserError(f"the training part has {len(held)} readable images, neighbours need 2 or more")
    own, outside = torch.arange(len(held)), torch.full((len(asked),), -1)
    gallery = Gallery(held.features, _people(held, own), cameras=False)
    search = Search(gallery, asked.features, depth=k)
    blocks = search.rank(asked.features, _people(asked, own if held is asked else outside))
    ranking = Ranking(*map(torch.cat, zip(*blocks, strict=True)))
    return ranking, {"search": search.about, "recall": search.recall}


def _people(part: PartFeatures, row: Int[Tensor, " n"]) -> People:
    return People(part.labels, torch.zeros_like(part.labels), row)


def choose_queries(nearest: Float[Tensor, " m"], settings: NeighboursConfig) -> dict[str, Int[Tensor, " q"]]:
    """Draw half of the queries, and take as the other half those with the lowest similarity ``nearest``."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(len(nearest), generator=generator)[: -(-settings.queries // 2)]
    return {"drawn": drawn, "isolated": nearest.argsort(stable=True)[: settings.queries // 2]}


def _queries(
    extractor: Extractor,
    features: Mapping[str, Mapping[str, PartFeatures]],
    found: Mapping[str, Ranking],
    asking: str,
    settings: NeighboursConfig,
) -> list[Result]:
    """Describe the chosen queries and their neighbours under each network, ready for JSON."""
    held, asked = (features["encoder"][part] for part in ("train", asking))
    chosen = choose_queries(found["encoder"].similarity[:, 0], settings)
    index = torch.cat([*chosen.values()])
    shown = {name: Ranking(*(values[index] for values in ranking)) for name, ranking in found.items()}
    copies = _copies(features, asking, index, shown)
    hits = {name: _hits(extractor, held.rows, shown[name], copies[name]) for name in shown}
    rows, kinds = asked.rows[index].tolist(), [kind for kind, some in chosen.items() for _ in some]
    return [
        {"image": extractor.parts[asking].key(row), "row": row, "part": asking, "chosen": kind}
        | {"neighbours": {name: of_all[place] for name, of_all in hits.items()}}
        for place, (row, kind) in enumerate(zip(rows, kinds, strict=True))
    ]


def _hits(
    extractor: Extractor, rows: Int[Tensor, " n"], ranking: Ranking, copies: Bool[Tensor, "q k"]
) -> list[list[Result]]:
    """Describe the neighbours of each query; they are right or wrong only if labels are used."""
    columns = {"row": rows[ranking.rows], "similarity": ranking.similarity, "near_duplicate": copies}
    if extractor.labelled:
        columns["right"] = ranking.right
    described = []
    for place, valid in enumerate(ranking.valid):
        cells = zip(*(column[place, valid].tolist() for column in columns.values()), strict=True)
        hits = [dict(zip(columns, values, strict=True)) for values in cells]
        described.append([{"image": extractor.parts["train"].key(hit["row"]), **hit} for hit in hits])
    return described


def _copies(
    features: Mapping[str, Mapping[str, PartFeatures]],
    asking: str,
    queries: Int[Tensor, " q"],
    shown: Mapping[str, Ranking],
) -> dict[str, Bool[Tensor, "q k"]]:
    """Return by network which neighbours are near-duplicates of their query, as ``stats`` defines them."""
    parts = dict.fromkeys(("train", asking))
    known, pixels = (
        torch.cat([features[name][part].features for part in parts]) for name in ("encoder", "raw_pixels")
    )
    rows = torch.stack([ranking.rows for ranking in shown.values()]).clamp_min(0)
    own = queries + (len(known) - len(features["encoder"][asking]))
    pairs = torch.stack([own[None, :, None].expand_as(rows), rows], dim=3)
    rule = StatsConfig()
    marks = are_duplicates(
        known, pixels, pairs.view(-1, 2), least=rule.min_similarity, least_pixels=rule.min_pixel_similarity
    )
    return dict(zip(shown, marks.view_as(rows), strict=True))


def _page(extractor: Extractor, result: Result, rows: list[Row]) -> str:
    about = f"Images of {extractor.data.root or extractor.data.name}. {_NOTE}"
    about += _FRAME_NOTE if extractor.labelled else ""
    header = f'<header><h1>Nearest neighbours</h1><p class="muted">{escape(about)}</p></header>'
    scores = section(_TITLE, _SCORE_NOTE, table(rows[0], rows[1:])) if rows else ""
    cards = dict.fromkeys(_KINDS, "")
    for query in result["queries"]:
        cards[query["chosen"]] += _card(extractor.parts, query)
    sections = [section(*_KINDS[kind], body) for kind, body in cards.items() if body]
    return page("Neighbours · contrastive pretraining", [header, scores, *sections])


def _card(parts: Mapping[str, Images], query: Result) -> str:
    """Draw a query with a strip of its neighbours under each network."""
    asked, held = parts[query["part"]], parts["train"]
    strips = ""
    for name, hits in query["neighbours"].items():
        tiles = [tile(asked, query["row"], query["image"], name.replace("_", " "))]
        for hit in hits:
            text = f"{hit['similarity']:.2f}{' copy' * hit['near_duplicate']}"
            tiles.append(tile(held, hit["row"], hit["image"], text, _FRAMES[hit.get("right")]))
        strips += strip(tiles)
    return card(query["image"], strips)

"""Find identities again: rank a gallery for each query picture, by the protocol of re-identification."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from contrastive.config import DataConfig, UserError, check_path
from contrastive.data.dataset import Dataset
from contrastive.data.files import shorten
from contrastive.data.images import Images
from eval.config import EvalConfig
from eval.features import PartFeatures
from eval.identities import Covered, open_identities, read_table
from eval.leakage import find_pretrained
from eval.pages.page import card, page, section, table
from eval.pages.strip import strip, tile
from eval.protocol import Result, Scoring, compare
from eval.ranking import Gallery, People, Ranking, Search, score_rankings
from eval.results import write_text
from eval.rival import open_rival
from eval.scores import Line, Scored
from eval.subject import Extractor
from eval.verdict import judge_row
from memory_bank.config import check_choice, check_range
from memory_bank.retrieval.faiss_search import FLAT_ROWS

_KS = (1, 5, 10)
_DEPTH = 1000  # ranks that are looked at in a large gallery
_RESAMPLES = 1000  # of identities, for an interval
_DRAWN = 1 << 20  # identities, of some resamples at once
_HITS = 10  # drawn of a query


@dataclass
class RetrievalConfig:
    """Settings of the ``retrieval`` protocol.

    Attributes:
        csv: Table ``path,identity`` and, if wanted, ``camera`` and ``part`` (``gallery`` or ``query``), with
            paths relative to ``data.root``, or to the table if that is not set. None: folders of identities
            below ``data.root``, in ``gallery`` and ``query`` or ``train`` and ``test``. Without parts each
            picture is a query, and all others are the gallery.
        groups: Table ``identity,group`` of identities that are easily taken for one another; first hits of
            the query's group are then counted too.
        gallery: What is ranked: ``each`` picture; or one entry for an identity (and camera): ``single``, one
            picture, drawn; ``mean``, the mean of its unit features; ``best``, its closest picture.
        covered: Shares of the query's area that are covered for further R@1, at random places.
        depth: Ranks that are looked at; None is all of up to 65,536 entries, and 1,000 of more. Below all,
            mAP counts the hits within them, and there is no mINP.
        min_recall: Least share of the closest ``depth`` entries that an approximate search must find.
        queries: Number of queries on the page, half of them drawn, half those that fare worst.
        against: Further networks to compare with, as ``worth.against``.
        seed: Decides what is drawn: pictures, places, resamples.
    """

    csv: str | None = None
    groups: str | None = None
    gallery: str = "each"
    covered: list[float] = field(default_factory=lambda: [0.2, 0.4])
    depth: int | None = None
    min_recall: float = 0.95
    queries: int = 12
    against: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("retrieval.gallery", self.gallery, ("each", "single", "mean", "best"))
        check_range("retrieval.depth", self.depth, max(_KS))
        check_range("retrieval.min_recall", self.min_recall, 0, 1)
        check_range("retrieval.queries", self.queries, 0, 200)
        check_range("retrieval.seed", self.seed, 0, 2**32 - 1)
        for name in ("csv", "groups"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, check_path(f"retrieval.{name}", path))
        if not all(0 < share < 1 for share in self.covered):
            raise ValueError(f"retrieval.covered={self.covered}: allowed are shares above 0 and below 1")


@dataclass
class RetrievalEvaluation(EvalConfig):
    """Settings of the ``retrieval`` protocol.

    Attributes:
        retrieval: See RetrievalConfig.
    """

    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


@dataclass(frozen=True)
class Subject:
    """Features of one network, ready to be searched.

    Attributes:
        search: The gallery.
        queries: Features of the queries by the name of their part, the first not covered.
        people: Who is on the test part.
        groups: Number of each identity's group; None without groups.
    """

    search: Search
    queries: dict[str, PartFeatures]
    people: People
    groups: Int[Tensor, " i"] | None = None

    def rank(self, part: str) -> Iterator[Ranking]:
        """Yield the rankings of a part of the queries."""
        return self.search.rank(self.queries[part].features, self.people.take(self.queries[part].rows))


class FindAgain(Scoring):
    """Score rankings of a gallery, and draw those of some queries into ``retrieval.html``.

    Another ``gallery`` than ``each`` is a variant with files of its own, ``retrieval-mean.html``.
    """

    @override
    def open_data(self, data: DataConfig, config: RetrievalEvaluation) -> Dataset:
        opened = open_identities(data, config.retrieval.csv)
        if opened.train is opened.test and config.retrieval.gallery in ("single", "mean"):
            raise UserError(
                f"retrieval.gallery={config.retrieval.gallery}: a query would be part of what it must find; "
                "name a gallery and a query part, or use retrieval.gallery=each or best"
            )
        return opened

    @override
    def suffix(self, config: RetrievalEvaluation) -> str:
        kind = config.retrieval.gallery
        return "" if kind == "each" else f"-{kind}"

    @override
    def further_parts(self, parts: Mapping[str, Images], config: RetrievalEvaluation) -> dict[str, Images]:
        seed = config.retrieval.seed
        return {
            f"query {100 * share:g}% covered": Covered(parts["test"], share, seed)
            for share in config.retrieval.covered
        }

    @override
    def others(self, extractor: Extractor, config: RetrievalEvaluation) -> dict[str, nn.Module]:
        read_groups(config.retrieval.groups, extractor.classes)  # refused before anything is computed
        return {text: open_rival("retrieval.against", text, extractor) for text in config.retrieval.against}

    @override
    def measure(self, extractor: Extractor, config: RetrievalEvaluation) -> Result:
        groups = read_groups(config.retrieval.groups, extractor.classes)
        scored, seconds = {}, {}
        drawing, pretrained, warnings = "", dict[str, int](), list[str]()
        for name in extractor.modules():
            features = extractor.part_features(name)
            before = time.perf_counter()
            subject = replace(prepare(extractor.parts, features, config.retrieval), groups=groups)
            scored[name] = self.score(subject, config.retrieval)
            if name == "encoder":
                drawing = _draw(
                    subject, torch.tensor(scored[name].details["ap"]), extractor, config.retrieval
                )
                run, test, rows = extractor.location.run, extractor.parts["test"], features["test"].rows
                pretrained, warnings = find_pretrained(run, test, extractor.data, rows.tolist())
            seconds[name] = round(time.perf_counter() - before, 3)
        suffix = self.suffix(config)
        file = extractor.location.results / f"retrieval{suffix}.html"
        scores = compare({name: each.lines for name, each in scored.items()})
        result: Result = {
            "sentence": judge_row(scores[0]),
            "scores": scores,
            "warnings": warnings + scored["encoder"].warnings,
            "pretrained": pretrained,
            "details": {name: each.details for name, each in scored.items()},
            "page": str(file),
            "seconds": seconds,
        }
        write_text(
            file, _page(self.variants.get(suffix, ""), self.table(result), result["sentence"], drawing)
        )
        return result

    @override
    def numbers(self, result: Result) -> Result:
        return {**super().numbers(result), "sentence": result["sentence"], "page": result["page"]}

    @override
    def notes(self, result: Result) -> list[str]:
        about = result["details"]["encoder"]
        search = f"{about['search']}, which finds {100 * about['recall']:.1f}% of the closest entries"
        return [
            *super().notes(result),
            search,
            *filter(None, [result["sentence"]]),
            f"page: {result['page']}",
        ]


def read_groups(file: str | None, identities: Sequence[str]) -> Int[Tensor, " i"] | None:
    """Return the number of each identity's group; one that is in no group is alone. None without a table.

    Raises:
        UserError: the table cannot be read, or has an unknown identity or one in several groups.
    """
    if file is None:
        return None
    rows = read_table(Path(file), ("identity", "group"), "retrieval.groups")
    group = {row["identity"]: row["group"] for row in rows}
    if torn := sorted({row["identity"] for row in rows if row["group"] != group[row["identity"]]}):
        raise UserError(
            f"retrieval.groups={file}: {len(torn)} identities are in several groups ({shorten(torn)}); give "
            "each one group"
        )
    if unknown := sorted({*group} - {*identities}):
        raise UserError(
            f"retrieval.groups={file}: {len(unknown)} identities are not in the data ({shorten(unknown)}); "
            "write them as the folders or the table of pictures do"
        )
    numbers: dict[str, int] = {}
    own = [f"group {group[name]}" if name in group else f"alone {name}" for name in identities]
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in own])


def prepare(
    parts: dict[str, Images], features: dict[str, PartFeatures], settings: RetrievalConfig
) -> Subject:
    """Build the gallery of one network's features.

    Args:
        parts: Images of ``train``, the gallery, of ``test``, the queries, and of the covered queries.
        features: Their features.
        settings: What is ranked, and how deep.
    """
    held, asked = parts["train"], parts["test"]
    cameras = getattr(held, "cameras", None)
    place = torch.full((len(held),), -1)
    place[features["train"].rows] = torch.arange(len(features["train"]))
    people = _people(asked, place if held is asked else torch.full((len(asked),), -1))
    shown = _people(held, torch.full((len(held),), -1)).take(features["train"].rows)
    gallery = Gallery(
        features["train"].features,
        shown,
        cameras=cameras is not None,
        kind=settings.gallery,
        seed=settings.seed,
    )
    depth = settings.depth or (len(gallery) if len(gallery) <= FLAT_ROWS else _DEPTH)
    search = Search(gallery, features["test"].features, depth=depth, min_recall=settings.min_recall)
    return Subject(search, {name: found for name, found in features.items() if name != "train"}, people)


def _people(images: Images, row: Int[Tensor, " n"]) -> People:
    assert images.labels is not None
    cameras: Tensor | None = getattr(images, "cameras", None)
    return People(images.labels, torch.zeros_like(images.labels) if cameras is None else cameras, row)


def score(subject: Subject, settings: RetrievalConfig) -> Scored:
    """Return R@1, R@5, R@10, mAP and mINP, R@1 of the group, and R@1 of covered queries.

    Queries without a right entry, because only their own camera saw them, are left out with a warning.
    Intervals resample identities, since the queries of one are alike.
    """
    search = subject.search
    who, scores, first = _scores_of(subject, "test")
    details: dict[str, Any] = {"search": search.about, "recall": search.recall, "ap": scores["mAP"].tolist()}
    warnings = _left_out(int(scores["R@1"].isnan().sum()), len(who)) + _warn_of_recall(search, settings)
    if search.depth < len(search.gallery):
        scores[f"mAP@{search.depth}"] = scores.pop("mAP")
        del scores["mINP"]
    lines = [identity_line(name, values, who, settings.seed) for name, values in scores.items()]
    if subject.groups is not None:
        near = (first >= 0) & (subject.groups[who] == subject.groups[first.clamp_min(0)])
        of_group = torch.where(near, scores["R@1"].clamp_min(1), scores["R@1"])
        lines.append(identity_line("R@1 of the group", of_group, who, settings.seed))
        wrong, by_group = (int(of.nansum()) for of in (1 - scores["R@1"], of_group - scores["R@1"]))
        details["wrong_first_hits"] = {"of_the_group": by_group, "others": wrong - by_group}
    for part in subject.queries:
        if part != "test":
            who, scores, _ = _scores_of(subject, part)
            lines.append(
                identity_line(f"R@1 {part.removeprefix('query ')}", scores["R@1"], who, settings.seed)
            )
    return Scored(lines, details, warnings)


PROTOCOL = FindAgain(
    RetrievalEvaluation,
    score,
    title="Identities found again",
    parts=("gallery", "query"),
    variants={
        "-single": "in one picture of each",
        "-mean": "in the mean of each one's pictures",
        "-best": "in each one's closest picture",
    },
)


def _warn_of_recall(search: Search, settings: RetrievalConfig) -> list[str]:
    if search.recall >= settings.min_recall:
        return []
    return [
        f"the search finds {search.recall:.3f} of the closest entries, retrieval.min_recall is "
        f"{settings.min_recall:g}; lower retrieval.depth"
    ]


def _left_out(count: int, total: int) -> list[str]:
    if count == total:
        raise UserError(
            f"none of {total} queries has a picture of its identity by another camera; add some to the "
            "gallery, or leave out the column camera"
        )
    return [f"{count} of {total} queries left out: no other camera saw them"] if count else []


def _scores_of(
    subject: Subject, part: str
) -> tuple[Int[Tensor, " m"], dict[str, Float[Tensor, " m"]], Int[Tensor, " m"]]:
    """Return each query's identity, its scores, and the identity of its first hit, -1 if there is none."""
    known = subject.search.gallery.people.identity
    parts, first = [], []
    for found in subject.rank(part):
        parts.append(score_rankings(found, _KS))
        top = found.valid.long().argmax(1, keepdim=True)
        row = found.rows.gather(1, top)[:, 0].clamp_min(0)
        first.append(torch.where(found.valid.any(1), known[row], -1))
    scores = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
    return subject.people.identity[subject.queries[part].rows], scores, torch.cat(first)


def identity_line(name: str, values: Float[Tensor, " m"], identity: Int[Tensor, " m"], seed: int) -> Line:
    """Return the mean over queries that are not nan, with a 95% bootstrap interval over identities.

    ``paired`` holds each identity's share of the sum, scaled so that their mean is the mean over queries.
    """
    usable = ~values.isnan()
    values, group = values[usable], torch.unique(identity[usable], return_inverse=True)[1]
    sizes = torch.bincount(group).double()
    sums = torch.zeros_like(sizes).index_add_(0, group, values.double())
    generator = torch.Generator().manual_seed(seed)
    means = []
    for few in torch.split(torch.arange(_RESAMPLES), max(1, _DRAWN // len(sums))):
        drawn = torch.randint(len(sums), (len(few), len(sums)), generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    kind = f"bootstrap over {len(sums)} identities"
    return Line(name, float(values.mean()), low, high, kind, (sums * len(sums) / sizes.sum()).float()[None])


def _draw(subject: Subject, ap: Float[Tensor, " m"], extractor: Extractor, settings: RetrievalConfig) -> str:
    """Return the HTML of the first hits of some queries: drawn at random, and the worst by ``ap``."""
    usable = (~ap.isnan()).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = usable[torch.randperm(len(usable), generator=generator)][: -(-settings.queries // 2)]
    worst = usable[ap[usable].argsort(stable=True)][: settings.queries // 2]
    titles = {"Drawn at random": drawn, "The worst, by average precision": worst}
    return "".join(
        section(title, "Left: the query. Then its first hits, right ones framed in green, wrong ones in red.",
                "".join(_strip(subject, extractor, int(row), float(ap[row])) for row in rows))
        for title, rows in titles.items()
    )  # fmt: skip


def _strip(subject: Subject, extractor: Extractor, index: int, ap: float) -> str:
    asked, held = (extractor.parts[part] for part in ("test", "train"))
    query = subject.queries["test"].take(torch.tensor([index]))
    [found] = subject.search.rank(query.features, subject.people.take(query.rows))
    shown = found.valid[0].nonzero()[:_HITS, 0]
    rows = extractor.part_features("encoder")["train"].rows[subject.search.gallery.row[found.rows[0, shown]]]
    hits = (
        tile(
            held,
            row,
            held.key(row),
            f"{found.similarity[0, entry]:.2f}",
            "right" if found.right[0, entry] else "wrong",
        )
        for row, entry in zip(rows.tolist(), shown.tolist(), strict=True)
    )
    row = int(query.rows)
    name = asked.key(row)
    return card(name, strip([tile(asked, row, name, "query"), *hits]), f"average precision {ap:.2f}")


def _page(variant: str, rows: list[tuple[str, ...]], sentence: str, drawing: str) -> str:
    note = f"{sentence} Accuracies in percent; in brackets: the encoder's gain over each baseline."
    title = ", ".join(filter(None, ["Identities found again", variant]))
    header = f"<header><h1>{title}</h1></header>{section('Scores', note, table(rows[0], rows[1:]))}"
    return page("Retrieval · contrastive pretraining", [header, drawing])

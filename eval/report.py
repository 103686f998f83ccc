"""report.html: a run on one self-contained page, from its run directory alone."""

import json
import logging
import math
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.sources import Images, Unreadable, open_held_out, open_train
from eval.comparison import write_comparison
from eval.config import EvalConfig
from eval.features import Extractor, Split, open_results, write_text
from eval.figures import colour, heat_map, interval_bar, line_chart, scatter
from eval.frozen import resolve
from eval.page import card, data_uri, legend, page, png, section
from eval.run_files import (
    BASELINES,
    CHARTS,
    STATISTICS,
    TITLES,
    number,
    points,
    read_csv,
    read_json,
    read_mined,
    read_results,
    read_stats,
    statistic,
)
from eval.stats import Health, health

log = logging.getLogger(__name__)

_MOST_ANCHORS = 10  # of the gallery
_MOST_POINTS = 1500  # of the map
_MOST_CLASSES = 40  # of a readable confusion matrix
_MOST_UNREADABLE = 10  # of the files shown
_THUMBNAIL = 96


@dataclass(frozen=True)
class Map:
    """Test features in the plane.

    Attributes:
        points: Coordinates.
        split: The rows they are of.
        classes: Names of the classes.
        method: ``t-SNE`` or ``PCA``.
        health: Of all test features.
    """

    points: Float[Tensor, "n 2"]
    split: Split
    classes: tuple[str, ...]
    method: str
    health: Health


def write_report(config: EvalConfig) -> dict[str, Any]:
    """Write ``<run>/report.html`` (or ``out/report.html``); returns where it is and what is missing in it.

    With ``compare`` it is a page over all of them, beside the first run (``write_comparison``).

    Raises:
        UserError: not a run directory, results that an evaluation did not write, or the page cannot be
            written.
    """
    if config.compare:
        return write_comparison(config)
    checkpoint = resolve(config.checkpoint)
    if checkpoint.run is None:
        raise UserError(
            f"checkpoint={config.checkpoint}: is not inside a run directory (no config.yaml there), so there "
            "is nothing to report; give runs/NAME"
        )
    run = checkpoint.run
    target = (Path(config.out) if config.out else run) / "report.html"
    open_results(target.parent)
    missing: list[str] = []
    text = build(run, config, missing)
    write_text(target, text)
    for reason in missing:
        log.warning("report: %s", reason)
    return {"protocol": "report", "file": str(target), "bytes": len(text.encode()), "missing": missing}


def build(run: Path, config: EvalConfig, missing: list[str]) -> str:
    """The document; what could not be drawn is named in ``missing`` and on the page."""
    settings = load_saved(PretrainConfig, run / "config.yaml")
    results = read_results(run)
    rows = read_csv(run / "metrics.csv")
    plane = _map(run, config, settings, missing)
    sections = [
        _header(run, settings, results, plane),
        _scores(results),
        _curves(rows),
        _health(run),
        _views(run),
        _gallery(run, settings, missing),
        _pictures(results, plane),
        _unreadable(run),
        _settings(run, results),
    ]
    if missing:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in missing)
        sections.insert(1, f'<div class="warning"><p>Not on this page:</p><ul>{items}</ul></div>')
    return page(f"{run.name} · contrastive pretraining", sections)


def _header(run: Path, settings: PretrainConfig, results: dict[str, Any], plane: Map | None) -> str:
    summary = read_json(run / "summary.json")
    encoder, data = settings.encoder, settings.data
    facts = [
        (f"{title.lower()}, {row['name']}", f"{100 * row['encoder']['value']:.1f}%")
        for protocol, title in TITLES.items()
        if protocol in results
        for row in _headline_rows(protocol, results[protocol])
    ]
    if plane is not None:
        rank, dim = plane.health.rankme, plane.split.features.shape[1]
        facts.append(("test features", plane.health.verdict))
        facts.append(("their effective rank", f"{rank:.0f} of {min(dim, len(plane.split))}"))
    if isinstance(seconds := summary.get("seconds"), int | float):
        facts.append(("training time", f"{seconds / 60:.1f} min"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    told = (
        f"{encoder.name}, width {encoder.width}, on {data.name} at {data.image_size} px without labels: "
        f"{settings.schedule.epochs} epochs in batches of {data.global_batch}, {settings.objective.name} "
        f"with negatives mined from the memory bank."
    )
    intro = f'<h1>{escape(run.name)}</h1><p class="muted">{escape(told)}</p>'
    return f'<header>{intro}<dl class="facts">{cells}</dl></header>'


def _headline_rows(protocol: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The first number; of few labels, the 10% one where it is there."""
    rows: list[dict[str, Any]] = result["scores"]
    tenth = [row for row in rows if row["name"].endswith(" 10%")]
    return tenth[:1] if protocol == "lowshot" and tenth else rows[:1]


def _scores(results: dict[str, Any]) -> str:
    if not results:
        return ""
    values = [
        row[name]["value"]
        for each in results.values()
        for row in each["scores"]
        for name in ("encoder", *BASELINES)
    ]
    floor = max(0.0, math.floor(10 * min(values, default=0.0) - 0.5) / 10)
    lines = []
    for protocol, title in TITLES.items():
        if protocol in results:
            lines.append(f'<tr class="group"><td colspan="5">{title}</td></tr>')
            lines += [_score_row(row, floor) for row in results[protocol]["scores"]]
    names = [
        ("encoder, 95% interval", "var(--s0)"),
        ("raw pixels", "var(--s1)"),
        ("random encoder", "var(--s2)"),
    ]
    head = "".join(
        f"<th>{name}</th>" for name in ("top-k accuracy, %", "encoder", "raw pixels", "random encoder")
    )
    head += f'<th class="picture">{100 * floor:.0f} to 100%</th>'
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    warnings = [text for each in results.values() for text in each["warnings"]]
    told = "".join(f'<p class="note warning">{escape(text)}</p>' for text in warnings)
    data = next(iter(results.values()))["data"]
    note = (
        f"Frozen features, {data['rows']['train']:,} training and {data['rows']['test']:,} test images; in "
        f"brackets what the encoder gains over that baseline on the same splits. "
        f"Test part: {data['test_part']}."
    )
    return section(
        "How good are the features?", note, f"{table}<p class='note picture'>{legend(names)}</p>{told}"
    )


def _score_row(row: dict[str, Any], floor: float) -> str:
    ours = row["encoder"]
    cells = [f"<td>{escape(row['name'])}</td>"]
    low, high = (f"{100 * ours[end]:.1f}" for end in ("low", "high"))
    cells.append(f'<td class="own">{100 * ours["value"]:.1f} <small>{low}–{high}</small></td>')
    for name in BASELINES:
        gain = row[name]["gain"]["value"]
        cells.append(f"<td>{100 * row[name]['value']:.1f} <small>({100 * gain:+.1f})</small></td>")
    marks = [(name, row[name]["value"]) for name in BASELINES]
    picture = interval_bar(ours["value"], ours["low"], ours["high"], marks, floor)
    return f'<tr>{"".join(cells)}<td class="picture">{picture}</td></tr>'


def _curves(rows: list[dict[str, str]]) -> str:
    cards = []
    for title, columns, caption in CHARTS:
        series = [(name, found) for name, spellings in columns if (found := points(rows, spellings))]
        if series:
            keys = [(name, f"var(--s{index})") for index, (name, _) in enumerate(series)]
            below = " · ".join(
                text for text in (legend(keys) if len(keys) > 1 else "", escape(caption)) if text
            )
            cards.append(card(title, line_chart(series), below))
    if not cards:
        return ""
    return section(
        "How did it learn?", "Over epochs, from metrics.csv.", f'<div class="grid2">{"".join(cards)}</div>'
    )


def _health(run: Path) -> str:
    """From the stats protocol: the encoder's numbers beside the baselines', and the closest pairs."""
    result = read_stats(run)
    if not result:
        return ""
    scores = result["scores"]
    names = [("encoder", "encoder"), *BASELINES.items()]
    rows = [
        "<tr>"
        + "".join(f"<th>{escape(text)}</th>" for text in ("", *(title for _, title in names)))
        + "</tr>"
    ]
    for key, title in STATISTICS.items():
        cells = (statistic(scores[name].get(key, "")) for name, _ in names)
        rows.append(f"<tr><td>{title}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    found = result["near_duplicates"]
    told = f"Pairs of near-duplicates: {found['pairs']}, {found['listed']} listed in {found['file']}."
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return section(
        "Are the features healthy?",
        "Features of training images, before the projector.",
        f'{table}<p class="note">{escape(told)}</p>',
    )


def _views(run: Path) -> str:
    file = run / "views.png"
    if not file.is_file():
        return ""
    body = (
        f'<div class="views"><img alt="images and their two views" src="{data_uri(file.read_bytes())}"></div>'
    )
    note = "First row: images. Below each: the two random views that must embed together."
    return section("What does the network see?", note, body)


def _gallery(run: Path, settings: PretrainConfig, missing: list[str]) -> str:
    try:
        mined = read_mined(run / "mined.csv")
    except UserError as error:
        missing.append(f"the hard negatives ({error})")
        return ""
    if not mined:
        return ""
    try:
        images: Images | None = open_train(settings.data)
    except UserError as error:
        missing.append(f"pictures of the hard negatives ({error})")
        images = None
    strips = []
    groups = [list(group) for _, group in groupby(mined, key=lambda row: row["anchor_row"])]
    for found in groups[:_MOST_ANCHORS]:
        anchor = int(found[0]["anchor_row"])
        figures = [_thumbnail(images, anchor, found[0]["anchor_key"], "anchor", same=False)]
        for row in found:
            other = int(row["negative_row"])
            same = _same_label(images, anchor, other)
            figures.append(
                _thumbnail(images, other, row["negative_key"], f"{number(row['similarity']):.2f}", same)
            )
        strips.append(f'<div class="mined">{"".join(figures)}</div>')
    labelled = images is not None and images.labels is not None
    framed = " A red frame: the same label, so probably not a negative at all." if labelled else ""
    note = "Left: an image. Right: the negatives mined for it, most similar first, with their similarity."
    return section("What does it find hard?", note + framed, "".join(strips))


def _thumbnail(images: Images | None, row: int, key: str, text: str, same: bool) -> str:
    shown = _read(images, row)
    frame = ' class="same"' if same else ""
    name = escape(key, quote=True)
    picture = (
        f'<img{frame} alt="{name}" src="{png(shown)}">' if shown is not None else '<div class="none"></div>'
    )
    # Right to left, so that a long path loses its beginning; the mark keeps its own order.
    caption = f"<b>{escape(text)}</b><br><bdi>{name}</bdi>"
    return f'<figure title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'


def _read(images: Images | None, row: int) -> Tensor | None:
    if images is None or not 0 <= row < len(images):
        return None
    try:
        image = images.read(row)
    except Unreadable:
        return None
    if image.shape[-1] <= _THUMBNAIL:
        return image
    small = torch.nn.functional.interpolate(
        image[None].float(), size=(_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True
    )
    return small[0].round().to(torch.uint8)


def _same_label(images: Images | None, first: int, second: int) -> bool:
    if images is None or images.labels is None or not 0 <= max(first, second) < len(images):
        return False
    return bool(images.labels[first] == images.labels[second]) and bool(images.labels[first] >= 0)


def _pictures(results: dict[str, Any], plane: Map | None) -> str:
    cards = []
    source = next((name for name in ("linear", "knn") if name in results), None)
    if source is not None:
        classes, counts = (
            results[source]["data"]["classes"],
            results[source]["details"]["encoder"]["confusion"],
        )
        worst = _confused(counts, classes)
        caption = f"{TITLES[source]}; rows are true classes, red is wrong. Most often: {worst}."
        picture = heat_map(counts, classes) if len(classes) <= _MOST_CLASSES else ""
        cards.append(card("Confusion", picture, escape(caption)))
    if plane is not None:
        few = len(plane.classes) <= 12
        keys = (
            [(name, colour(index, len(plane.classes))) for index, name in enumerate(plane.classes)]
            if few
            else []
        )
        caption = f"{plane.method} of {len(plane.points)} test images, coloured by class. "
        cards.append(
            card(
                "Map",
                scatter(plane.points, plane.split.labels, plane.classes),
                escape(caption) + legend(keys),
            )
        )
    if not cards:
        return ""
    return section(
        "Where does it err?",
        "Labels colour these pictures; training never saw them.",
        f'<div class="grid2">{"".join(cards)}</div>',
    )


def _confused(counts: list[list[int]], classes: list[str]) -> str:
    """The three most frequent mistakes, in words."""
    pairs = [
        (count, f"{classes[row]} as {classes[column]} ({count})")
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
        if row != column and count
    ]
    return ", ".join(text for _, text in sorted(pairs, key=lambda pair: -pair[0])[:3]) or "none"


def _unreadable(run: Path) -> str:
    """The first files of corrupt.csv, and how many there are."""
    rows = read_csv(run / "corrupt.csv")
    if not rows:
        return ""
    cells = [[row.get(name) or "" for name in ("key", "reason")] for row in rows[:_MOST_UNREADABLE]]
    lines = ["".join(f"<td>{escape(text)}</td>" for text in line) for line in cells]
    body = "".join(f"<tr>{line}</tr>" for line in ("<th>file</th><th>reason</th>", *lines))
    return section(
        "What could not be read?",
        f"Files that training left out: {len(rows)}, {len(cells)} of them here, all in corrupt.csv.",
        f'<div class="scroll"><table class="set">{body}</table></div>',
    )


def _settings(run: Path, results: dict[str, Any]) -> str:
    files = {"config.yaml": (run / "config.yaml").read_text()}
    for protocol, result in results.items():
        kept = {name: value for name, value in result.items() if name not in ("scores", "details")}
        files[f"eval/{protocol}.json"] = json.dumps(kept, indent=1)
    body = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in files.items()
    )
    return section("What produced this?", "Every setting, hash and version.", body)


def _map(run: Path, config: EvalConfig, settings: PretrainConfig, missing: list[str]) -> Map | None:
    """Test features of the run's encoder in the plane; None, with a reason, where they cannot be had."""
    try:
        if open_held_out(settings.data) is None:
            return None  # no labels, so nothing to colour: the page is whole without it
        extractor = Extractor(replace(config, checkpoint=str(run)), resolve(str(run)))
        test = extractor.features("encoder").test
    except UserError as error:
        missing.append(f"the map of the features ({error})")
        return None
    shown = torch.linspace(0, len(test) - 1, min(_MOST_POINTS, len(test))).long()
    points, method = _project(test.features[shown])
    return Map(points, test.take(shown), extractor.classes, method, health(test.features))


def _project(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n 2"], str]:
    """t-SNE where scikit-learn is installed, the first two principal components otherwise."""
    centred = features - features.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:50].T
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return _two(flat), "PCA"
    if len(flat) < 50:
        return _two(flat), "PCA"
    embedded = TSNE(init="pca", random_state=0, perplexity=30).fit_transform(flat.numpy())
    return torch.from_numpy(embedded), "t-SNE"


def _two(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, 2))[:, :2]

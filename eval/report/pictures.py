"""Build the sections of one run about its images: views, hard negatives, attention, neighbours, mistakes."""

import math
import os
from collections.abc import Sequence
from html import escape
from itertools import groupby
from urllib.parse import quote

from contrastive.config import UserError
from contrastive.data.images import Images
from contrastive.drawing.canvas import data_uri
from contrastive.drawing.figures import class_colour, confusion, scatter
from contrastive.logging.hard_negatives import HardNegative
from eval.pages.page import card, grid, legend, section, table
from eval.pages.strip import strip, tile
from eval.protocol import Row
from eval.report.context import Map, Report
from eval.report.read import Measured, Run, read_mined
from eval.run_files import read_csv

_CONFUSIONS = {"linear": "Linear probe", "worth": "Linear probe", "knn": "Nearest neighbours"}
"""Protocols whose confusion matrix is shown, the preferred one first, and what it is of."""

_MOST_ANCHORS = 10  # in the gallery
_MOST_CLASSES = 40  # in a readable confusion matrix
_MOST_NAMES = 12  # classes in the legend of the map
_MOST_UNREADABLE = 10  # files listed
_MOST_SHEETS = 4  # pictures of attention


def views(report: Report) -> str:
    """Show views.png."""
    file = report.runs[0].folder / "views.png"
    if not report.alone or not file.is_file():
        return ""
    source = data_uri(file.read_bytes())
    body = f'<div class="views"><img alt="images and their two views" src="{source}"></div>'
    note = "First row: images. Below each: the two random views that must embed together."
    if report.images is not None and report.images.frames:
        note = "In threes: a clip of a video, then the two random views that must embed together."
    return section("What does the network see?", note, body)


def gallery(report: Report) -> str:
    """Show mined.csv: anchors beside their negatives; negatives of the same label have a frame."""
    if not report.alone:
        return ""
    try:
        mined = read_mined(report.runs[0].folder / "mined.csv")
    except UserError as error:
        report.missing.append(f"the hard negatives ({error})")
        return ""
    if not mined:
        return ""
    images = report.images
    groups = [list(found) for _, found in groupby(mined, key=lambda row: row.anchor_row)]
    strips = "".join(_strip(images, found) for found in groups[:_MOST_ANCHORS])
    note = "Left: an image. Right: the most similar of its negatives, with their similarity."
    if images is not None and images.labels is not None:
        note += " A red frame: the same label. With few classes, most of the closest images have it."
    return section("What does it find hard?", note, strips)


def _strip(images: Images | None, found: Sequence[HardNegative]) -> str:
    labels = images.labels if images is not None else None
    negatives = (
        tile(
            images,
            row.negative_row,
            row.negative_key,
            f"{row.similarity:.2f}",
            "same" if row.same_label(labels) else "",
        )
        for row in found
    )
    return strip([tile(images, found[0].anchor_row, found[0].anchor_key, "anchor"), *negatives])


def attention(report: Report) -> str:
    """Show the numbers and some of the pictures of the attention protocol."""
    run = report.runs[0]
    return "".join(_attention(run, found) for found in run.measured) if report.alone else ""


def _attention(run: Run, found: Measured) -> str:
    if found.attention is None:
        return ""
    page = found.files["attention"].with_suffix(".html")
    files = sorted(page.with_suffix("").glob("*.png"), key=lambda file: (len(file.name), file))
    if not files:
        return ""
    scores = table(found.attention[0], found.attention[1:]) if found.attention else ""
    shown = files[:: math.ceil(len(files) / _MOST_SHEETS)]
    body = "".join(
        f'<div class="sheet"><img alt="attention in an image" src="{data_uri(file.read_bytes())}"></div>'
        for file in shown
    )
    all_of_them = page.relative_to(run.folder)
    note = f"{len(shown)} of {len(files)} pictures; {all_of_them} has all, and says what they show."
    return section(f"{found.name('What does it attend to')}?", note, scores + body)


def isolated(report: Report) -> str:
    """List the most isolated images that the neighbours protocol found, and lead to its page."""
    measured = report.runs[0].measured if report.alone else []
    return "".join(
        _isolated(report, found, found.isolated) for found in measured if found.isolated is not None
    )


def _isolated(report: Report, found: Measured, isolated: list[Row]) -> str:
    file, folder = found.files["neighbours"].with_suffix(".html"), report.runs[0].folder
    link = quote(os.fsencode(os.path.relpath(file, report.config.out or folder)))
    name = escape(str(file.relative_to(folder)))
    page = f'<p class="note"><a href="{link}">{name}</a> shows what is near these.</p>'
    note = "Images that are least similar to their nearest: rare things, or what has no place here."
    rows = table(["image", "nearest", "cosine"], isolated, "set")
    return section(f"{found.name('What stands apart')}?", note, page + rows)


def mistakes(report: Report) -> str:
    """Show the confusion matrix and a map of the test features."""
    if not report.alone:
        return ""
    cards = [_confusion(report), _map(report.map) if report.map is not None else ""]
    if not any(cards):
        return ""
    note = "Labels colour these pictures; training never saw them."
    return section("Where does it err?", note, grid(cards))


def _confusion(report: Report) -> str:
    for found in report.runs[0].measured:
        for protocol, title in _CONFUSIONS.items():
            result = found.results.get(protocol)
            if result is not None and result.confusion is not None:
                worst = confused(result.confusion, result.classes)
                caption = f"{found.name(title)}; rows are true classes, red is wrong. Most often: {worst}."
                few = len(result.classes) <= _MOST_CLASSES
                picture = confusion(result.confusion, result.classes).svg() if few else ""
                return card("Confusion", picture, escape(caption))
    return ""


def confused(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Name the three most frequent mistakes."""
    pairs = [
        (count, f"{classes[row]} as {classes[column]} ({count})")
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
        if row != column and count
    ]
    return ", ".join(text for _, text in sorted(pairs, key=lambda pair: -pair[0])[:3]) or "none"


def _map(plane: Map) -> str:
    names = plane.classes if len(plane.classes) <= _MOST_NAMES else ()
    keys = [(name, class_colour(index, len(names))) for index, name in enumerate(names)]
    caption = f"{plane.method} of {len(plane.points)} test images, coloured by class. "
    drawing = scatter(plane.points, plane.labels, plane.classes, "map of the test features")
    return card("Map", drawing.svg(), escape(caption) + legend(keys))


def unreadable(report: Report) -> str:
    """Count the rows of corrupt.csv, and list the first ones."""
    rows = read_csv(report.runs[0].folder / "corrupt.csv") if report.alone else []
    if not rows:
        return ""
    lines = [[row.get(name) or "" for name in ("key", "reason")] for row in rows[:_MOST_UNREADABLE]]
    note = f"Files that training left out: {len(rows)}, {len(lines)} of them here, all in corrupt.csv."
    return section("What could not be read?", note, table(["file", "reason"], lines, "set"))

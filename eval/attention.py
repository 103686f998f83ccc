"""Draw what an encoder attends to, beside a random encoder; with masks, measure how much is on the thing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from contrastive.config import DataConfig, UserError, check_path
from contrastive.data.images import spread_rows
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from contrastive.drawing.canvas import Drawing, png
from contrastive.encoders.encoder import Encoder
from eval.attention_maps import compute_maps, draw
from eval.attention_over_time import compute_weights, draw_weights, middle_clip
from eval.config import EvalConfig
from eval.masks import mask_file, over_area, read_mask
from eval.pages.page import card, page, section, table
from eval.protocol import Protocol, Result, Row, compare
from eval.results import write_bytes, write_text
from eval.scores import Line, t_interval
from eval.subject import Extractor
from memory_bank.config import check_range

_NETWORKS = ("encoder", "random_encoder")
_MOST_IMAGES = 64  # drawn; they are one batch
_BATCH = 16  # scored at once
_ATTENDS = "What {} attends to"
_ATTENTION_NOTE = (
    "Maps are the attention of the class token, as a multiple of an even spread over the picture. The "
    "rollout follows it through all blocks by the product of (A + I) / 2 (Abnar and Zuidema 2020). The last "
    "layer is the mean of its heads, which are drawn beside it."
)
_SIMILARITY_NOTE = (
    "This network has no class token that attends to every position, so no attention can be followed through "
    "it. The map is the cosine of each position's feature with the mean of all positions."
)
_ROWS_NOTE = (
    "Components are the first three principal components of the tokens of all these images, so equal colours "
    "are similar tokens. The second row is a network of the same shape that was never trained."
)
_TIME_NOTE = (
    "Bars are the weights of the frames of one clip of each video, as a multiple of an even spread, which is "
    "the line. Of an attention head they are the class token's attention, followed through all blocks (Abnar "
    "and Zuidema 2020), of a nuta head the mean attention of its moments. The second row is a network of the "
    "same shape that was never trained."
)


@dataclass
class AttentionConfig:
    """Settings of the pictures of attention.

    Attributes:
        images: Number of images drawn, spread evenly over the test part, or over the training part if there
            is no test part.
        masks: Folder of masks: PNG files with the images' relative names and proportions, nonzero where the
            thing is.
        scored: Number of images, spread evenly, that are scored if they have a mask.
    """

    images: int = 8
    masks: str | None = None
    scored: int = 256

    def __post_init__(self) -> None:
        check_range("attention.images", self.images, 1, _MOST_IMAGES)
        check_range("attention.scored", self.scored, 2)
        if self.masks is not None:
            self.masks = check_path("attention.masks", self.masks)


@dataclass
class AttentionEvaluation(EvalConfig):
    """Settings of the ``attention`` protocol.

    Attributes:
        attention: See AttentionConfig.
    """

    attention: AttentionConfig = field(default_factory=AttentionConfig)


class Attention(Protocol):
    """Draw attention maps into ``attention.html`` and PNG files; score them where masks are given."""

    labelled: ClassVar[bool] = False

    @override
    def measure(self, extractor: Extractor, config: AttentionEvaluation) -> Result:
        started, settings = time.perf_counter(), config.attention
        networks = {name: _network(extractor, name) for name in _NETWORKS}
        lines: dict[str, list[Line]] = {}
        warnings: list[str] = []
        if settings.masks is not None:
            lines, warnings = _score(networks, extractor, Path(settings.masks), settings.scored)
        pixels, images = _read_some(extractor, settings.images)
        drawn = _draw(networks, pixels, extractor.data)
        drawings = drawn.sheets
        files = _write_pictures(extractor.location.results / "attention", images, drawings)
        result: Result = {
            "scores": compare(lines) if lines else [],
            "warnings": warnings,
            "details": {name: _details(lines.get(name, [])) | drawn.details[name] for name in networks},
            "pictures": files,
            "page": str(extractor.location.results / "attention.html"),
            "seconds": {"attention": round(time.perf_counter() - started, 3)},
        }
        shown = {images.key(row): drawing for row, drawing in enumerate(drawings)}
        page = _page(_header(extractor, drawn), self.table(result), shown)
        write_text(Path(result["page"]), page)
        return result

    @override
    def numbers(self, result: Result) -> Result:
        scores = {row["name"]: {name: row[name]["value"] for name in _NETWORKS} for row in result["scores"]}
        return {"scores": scores, "page": result["page"], "pictures": result["pictures"]}

    @override
    def table(self, result: Result) -> list[Row]:
        if not result["scores"]:
            return []
        rows: list[Row] = [("share on the thing over its area", "encoder", "95% interval", "random encoder")]
        for row in result["scores"]:
            ours, other = (row[name] for name in _NETWORKS)
            interval = f"{ours['low']:.2f} to {ours['high']:.2f}"
            beside = f"{other['value']:.2f} ({other['gain']['value']:+.2f})"
            rows.append((row["name"], f"{ours['value']:.2f}", interval, beside))
        return rows

    @override
    def notes(self, result: Result) -> list[str]:
        kinds = dict.fromkeys(f"95% interval: {row['interval']}" for row in result["scores"])
        return [*kinds, f"{len(result['pictures'])} pictures: {result['page']}"]


PROTOCOL = Attention(AttentionEvaluation)


@dataclass(frozen=True)
class _Drawn:
    """Sheets of some images or clips, what they show in words, and numbers of each network."""

    sheets: list[Drawing]
    title: str  # of the page, the network in place of {}
    note: str
    details: dict[str, dict[str, Any]]


def _draw(networks: dict[str, Encoder], pixels: Tensor, data: DataConfig) -> _Drawn:
    """Draw maps over images, or the weights of a clip's frames."""
    if pixels.ndim == 5:
        clips = middle_clip(pixels, data)
        weights = {name: compute_weights(each, clips, data) for name, each in networks.items()}
        numbers = {name: {"frame_weights": found.tolist()} for name, found in weights.items()}
        return _Drawn(draw_weights(weights, clips, data), _ATTENDS, _TIME_NOTE, numbers)
    maps = {name: compute_maps(each, pixels, data) for name, each in networks.items()}
    title, kind = _ATTENDS, _ATTENTION_NOTE
    if maps["encoder"].heads is None:
        rows, columns = next(iter(maps["encoder"].maps.values())).shape[1:]
        title, kind = "Similarity maps of {}", f"{_SIMILARITY_NOTE} It has {rows} x {columns} cells."
    return _Drawn(draw(maps, pixels, data), title, f"{kind} {_ROWS_NOTE}", {name: {} for name in networks})


def _network(extractor: Extractor, name: str) -> Encoder:
    network = extractor.modules()[name]().to(extractor.device).eval()
    assert isinstance(network, Encoder)
    return network


def _read_some(extractor: Extractor, count: int) -> tuple[Tensor, SomeImages]:
    """Read images spread evenly over the test part, or the training part; leave out unreadable ones."""
    part = "test" if "test" in extractor.parts else "train"
    images = extractor.parts[part]
    rows = spread_rows(len(images), count)
    decoded = decode_all(SomeImages(images, rows))
    extractor.unreadable[part] = len(decoded.bad)
    if not len(decoded.batch.ids):
        raise UserError(
            f"{part} part of data.name={extractor.data.name}: none of {len(rows)} images can be read"
        )
    return decoded.batch.images, SomeImages(images, rows[decoded.batch.ids])


def _write_pictures(folder: Path, images: SomeImages, drawings: Sequence[Drawing]) -> list[str]:
    """Write a PNG file for each image, named by its row; remove those of an earlier evaluation."""
    files = [folder / f"{row}.png" for row in images.rows.tolist()]
    for stale in {*folder.glob("*.png")} - {*files}:
        stale.unlink()
    for file, drawing in zip(files, drawings, strict=True):
        write_bytes(file, png(drawing.pixels()))
    return [str(file) for file in files]


def _score(
    networks: dict[str, Encoder], extractor: Extractor, folder: Path, count: int
) -> tuple[dict[str, list[Line]], list[str]]:
    """Score the maps of images that have a mask; return the numbers of each network, and warnings."""
    if not folder.is_dir():
        raise UserError(f"attention.masks={folder}: no such folder; give the folder of the images' masks")
    if extractor.data.frames > 1:
        raise UserError(
            f"attention.masks={folder}: masks are of images, data.name={extractor.data.name} has videos; "
            "leave attention.masks out"
        )
    pixels, images = _read_some(extractor, count)
    files = [mask_file(folder, images.key(row)) for row in range(len(images))]
    masks = {
        row: read_mask(file, extractor.data, images.dimensions(row))
        for row, file in enumerate(files)
        if file.is_file()
    }
    masks = {row: mask for row, mask in masks.items() if mask.any()}
    if len(masks) < 2:
        raise UserError(
            f"attention.masks={folder}: holds masks of a thing for {len(masks)} of {len(images)} images, 2 "
            f"or more are needed; the mask of {images.key(0)} would be {files[0]}"
        )
    lacking = len(images) - len(masks)
    warnings = [f"{lacking} of {len(images)} images have no mask of a thing"] if lacking else []
    rows = torch.tensor([*masks])
    lines = {}
    for name, network in networks.items():
        ratios: dict[str, list[float]] = {}
        for some in torch.split(rows, _BATCH):
            maps = compute_maps(network, pixels[some], extractor.data).maps
            for title, values in maps.items():
                found = (over_area(v, masks[row]) for v, row in zip(values, some.tolist(), strict=True))
                ratios.setdefault(title, []).extend(found)
        lines[name] = [_line(title, torch.tensor(values)) for title, values in ratios.items()]
    return lines, warnings


def _line(title: str, ratios: Tensor) -> Line:
    low, high = t_interval(ratios.double())
    return Line(title, float(ratios.mean()), low, high, f"t over {len(ratios)} images", ratios[None])


def _details(lines: Sequence[Line]) -> dict[str, Any]:
    return {line.name: line.paired[0].tolist() for line in lines}


def _header(extractor: Extractor, drawn: _Drawn) -> str:
    network, data = escape(str(extractor.frozen.about["name"])), extractor.data
    images = f"Images of {escape(data.root or data.name)}."
    return (
        f'<header><h1>{drawn.title.format(network)}</h1><p class="muted">{images} {drawn.note}</p></header>'
    )


def _page(header: str, rows: list[Row], drawings: Mapping[str, Drawing]) -> str:
    """Return the HTML page: the table of scores, if there are any, and the sheet of each image."""
    scores = ""
    if rows:
        note = (
            "1 is what an even spread gives; masks say where the thing is. In brackets: the encoder's gain."
        )
        scores = section("How much of it is on the thing?", note, table(rows[0], rows[1:]))
    figures = "".join(card(name, drawing.svg()) for name, drawing in drawings.items())
    return page("Attention · contrastive pretraining", [header, scores, figures])

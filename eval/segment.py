"""Find the actions of long recordings without labels, and draw and score them."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.files import shorten
from contrastive.data.images import read_or_none
from contrastive.drawing.canvas import Box, Drawing, Label, Picture, Shape
from contrastive.drawing.figures import class_colour
from contrastive.drawing.images import scaled
from eval.action_scores import match, runs, score_actions
from eval.config import EvalConfig
from eval.footage import Footage
from eval.identities import read_table
from eval.pages.page import card, legend, page, section, table
from eval.protocol import Result, Row, Scoring, compare
from eval.results import write_text
from eval.scores import Line, Scored
from eval.segmenting import DECODERS, Segmentation, describe_windows, segment
from eval.subject import Extractor
from eval.verdict import judge_row
from memory_bank.config import check_choice, check_range

_SUB_ACTIONS = 32  # where the number of actions is not given
_SPLIT = 4  # sub-actions for each action
_WIDTH, _HEIGHT, _TILE = 900, 16, 80
_TYPICAL = 8  # frames drawn of an action
_MATCHED = {"set": False, "video": True}
_READING = (
    "path: as segment.decoder says; argmax: the closest sub-action of each frame alone; set: actions matched "
    "once over the set; video: anew for each recording, which is easier"
)
Ints = NDArray[np.int64]


@dataclass
class SegmentConfig:
    """Settings of the ``segment`` protocol.

    Attributes:
        actions: Number of actions; None chooses it, without labels, by the largest gap among the eigenvalues
            of the sub-actions' co-occurrence.
        sub_actions: Number of clusters that actions are made of; None is four for each action, or 32.
        window: Frames, odd, over which appearance is averaged and motion is measured.
        duration: Mean length of an action in frames, from which the cost of a switch follows; None estimates
            it, without labels.
        decoder: ``viterbi``: the likeliest path; ``transport``: optimal transport that keeps neighbours
            together (eval/transport.py), which has no use for ``duration``.
        drawn: Number of recordings on the page.
        seed: Of the clusters.
    """

    actions: int | None = None
    sub_actions: int | None = None
    window: int = 7
    duration: float | None = None
    decoder: str = "viterbi"
    drawn: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("segment.actions", self.actions, 1)
        check_range("segment.sub_actions", self.sub_actions, 1)
        check_range("segment.window", self.window, 1, 10_001)
        check_range("segment.duration", self.duration, 2)
        check_choice("segment.decoder", self.decoder, DECODERS)
        check_range("segment.drawn", self.drawn, 0)
        check_range("segment.seed", self.seed, 0, 2**31 - 1)
        if self.window % 2 == 0:
            raise ValueError(f"segment.window={self.window}: an odd number is needed, e.g. {self.window + 1}")
        if self.actions and self.sub_actions and self.actions > self.sub_actions:
            raise ValueError(
                f"segment.actions={self.actions}: more than segment.sub_actions={self.sub_actions}, of which "
                "they are made; raise segment.sub_actions or leave it out"
            )

    @property
    def clusters(self) -> int:
        """The number of sub-actions."""
        return self.sub_actions or (_SPLIT * self.actions if self.actions else _SUB_ACTIONS)


@dataclass
class SegmentEvaluation(EvalConfig):
    """Settings of the ``segment`` protocol.

    Attributes:
        segment: See SegmentConfig.
    """

    segment: SegmentConfig = field(default_factory=SegmentConfig)


@dataclass(frozen=True)
class Truth:
    """The true actions: their names, and the number of each frame's."""

    names: list[str]
    actions: Ints


class Segment(Scoring):
    """Segment recordings by the features of each network; write ``segment.html`` and ``segments.csv``."""

    labelled: ClassVar[bool] = False

    @override
    def open_data(self, data: DataConfig, config: SegmentEvaluation) -> Dataset:
        footage = Footage(root_of(data), data.stored_size, data.white)
        check_lengths(footage, config.segment)
        read_truth(root_of(data), footage)  # refused before anything is computed
        return Dataset(footage)

    @override
    def measure(self, extractor: Extractor, config: SegmentEvaluation) -> Result:
        footage = extractor.parts["train"]
        assert isinstance(footage, Footage)
        truth = read_truth(root_of(extractor.data), footage)
        scored: dict[str, Scored] = {}
        seconds = {}
        for name in extractor.modules():
            found = extractor.part_features(name)["train"]
            before = time.perf_counter()
            rows = fill_in(found.rows.numpy(), footage)
            windows = describe_windows(found.features.numpy()[rows], footage.starts, config.segment.window)
            actions = find_actions(windows, footage.starts, config.segment)
            scored[name] = self.score((actions, footage, truth), config)
            seconds[name] = round(time.perf_counter() - before, 3)
            if name == "encoder":
                ours, features = actions, windows
        folder = extractor.location.results
        lines = {name: each.lines for name, each in scored.items()}
        result: Result = {
            "scores": compare(lines) if truth is not None else [],
            "warnings": [],
            "details": {name: each.details for name, each in scored.items()},
            "page": str(folder / "segment.html"),
            "segments": str(folder / "segments.csv"),
            "seconds": seconds,
        }
        names = name_actions(ours, truth)
        typical = distance_to_action(features, ours.path)
        write_text(Path(result["segments"]), _segments(ours, footage, names, typical))
        drawing = _draw(ours, footage, truth, names, typical, config.segment.drawn)
        write_text(Path(result["page"]), _page(self.table(result), drawing))
        return result

    @override
    def numbers(self, result: Result) -> Result:
        told = {name: result[name] for name in ("page", "segments")}
        return {**super().numbers(result), **told} if result["scores"] else {"scores": {}, **told}

    @override
    def table(self, result: Result) -> list[Row]:
        return super().table(result) if result["scores"] else []

    @override
    def notes(self, result: Result) -> list[str]:
        ours = result["details"]["encoder"]
        how = "given" if ours["given"] else "chosen by the largest gap of eigenvalues"
        return [
            *super().notes(result),
            *([_READING, judge_row(result["scores"][0])] if result["scores"] else []),
            f"{ours['actions']} actions ({how}) of {ours['sub_actions']} sub-actions; {ours['segments']} "
            f"segments; length of an action by the closest sub-actions: {ours['duration']:.0f} frames",
            f"{result['segments']}, {result['page']}",
        ]


def score(found: tuple[Segmentation, Footage, Truth | None], config: SegmentEvaluation) -> Scored:
    """Return MoF, F1, mIoU and edit of path and argmax, matched over the set and for each recording."""
    actions, footage, truth = found
    lines: list[Line] = []
    if truth is not None:
        for decoder in ("path", "argmax"):
            for matched, each in _MATCHED.items():
                scores = score_actions(getattr(actions, decoder), truth.actions, footage.starts, each=each)
                lines += [replace(line, name=f"{line.name} {decoder}, {matched}") for line in scores]
    ends = zip(footage.starts[:-1], footage.starts[1:], strict=True)
    details: dict[str, Any] = {
        "actions": len({*actions.group.tolist()}),
        "given": config.segment.actions is not None,
        "sub_actions": len(actions.group),
        "duration": actions.duration,
        "segments": sum(len(runs(actions.path[start:end])) for start, end in ends),
        "eigenvalues": actions.eigenvalues.tolist(),
    }
    return Scored(lines, details)


PROTOCOL = Segment(SegmentEvaluation, score, title="Actions of recordings")


def find_actions(windows: NDArray[np.float32], starts: Ints, settings: SegmentConfig) -> Segmentation:
    """Segment the recordings; a window's frames repeat one another, so each has that share of evidence."""
    return segment(
        windows,
        starts,
        sub_actions=settings.clusters,
        actions=settings.actions,
        duration=settings.duration,
        evidence=1 / settings.window,
        decoder=settings.decoder,
        seed=settings.seed,
    )


def check_lengths(footage: Footage, settings: SegmentConfig) -> None:
    """Refuse clusters of single frames, which have no width, and windows longer than a recording.

    Raises:
        UserError: there are as many sub-actions as frames, or more, or a recording is too short.
    """
    if settings.clusters >= len(footage):
        raise UserError(
            f"segment.sub_actions: {settings.clusters} clusters of {len(footage)} frames; set "
            "segment.sub_actions to fewer, or give more recordings"
        )
    lengths = np.diff(footage.starts)
    short = [footage.names[at] for at in np.flatnonzero(lengths < settings.window)]
    if short:
        most = int(lengths.min()) - (int(lengths.min()) % 2 == 0)
        raise UserError(
            f"segment.window={settings.window}: {len(short)} recordings have fewer frames ({shorten(short)}; "
            f"the shortest {lengths.min()}); set segment.window={most}, or move these recordings away"
        )


def read_truth(root: Path, footage: Footage) -> Truth | None:
    """Read ``NAME.csv`` (frame,action) beside each recording; None if there are no such tables.

    Raises:
        UserError: some recordings have none, or one does not name the action of each frame in order.
    """
    files = [root / f"{name}.csv" for name in footage.names]
    missing = [file.name for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise UserError(
            f"data.root={root}: {len(missing)} of {len(files)} recordings have no table of actions "
            f"({shorten(missing)}); add them, or move the others away"
        )
    actions = []
    for file, frames in zip(files, np.diff(footage.starts).tolist(), strict=True):
        rows = read_table(file, ("frame", "action"), "actions")
        numbers = [row["frame"] for row in rows]
        wrong = next((at for at, number in enumerate(numbers) if number != str(at)), None)
        if wrong is not None:
            raise UserError(
                f"{file}: frame {numbers[wrong]!r} where {wrong} is due; number all frames from 0, "
                "without gaps"
            )
        if len(rows) != frames:
            raise UserError(
                f"{file}: actions of {len(rows)} frames, the recording has {frames}; give each frame its own"
            )
        actions += [row["action"] for row in rows]
    names, numbered = np.unique(actions, return_inverse=True)
    return Truth(names.tolist(), numbered.astype(np.int64))


def fill_in(rows: Ints, footage: Footage) -> Ints:
    """Return the place among readable ``rows`` that stands for each frame: its own, or the one before it.

    Raises:
        UserError: no frame of a recording can be read.
    """
    first, end = (np.searchsorted(rows, edge) for edge in (footage.starts[:-1], footage.starts[1:]))
    if empty := [footage.names[at] for at in np.flatnonzero(first == end)]:
        raise UserError(f"data.root: no frame of {shorten(empty)} can be read; move these recordings away")
    places = np.searchsorted(rows, np.arange(len(footage)), side="right") - 1
    sizes = np.diff(footage.starts)
    return np.clip(places, np.repeat(first, sizes), np.repeat(end - 1, sizes))


def name_actions(found: Segmentation, truth: Truth | None) -> list[str]:
    """Return the name of each action: the true one that it matches over the set, or its number."""
    matched = {} if truth is None else match(found.path, truth.actions)
    count = int(found.group.max()) + 1
    return [
        truth.names[matched[action]] if truth is not None and action in matched else f"action {action}"
        for action in range(count)
    ]


def distance_to_action(features: NDArray[np.float32], path: Ints) -> NDArray[np.float64]:
    """Return each frame's squared distance to the mean of its action: the smallest is the most typical."""
    distances = np.zeros(len(path))
    for action in np.unique(path):
        rows = features[path == action].astype(np.float64)
        distances[path == action] = np.square(rows - rows.mean(0)).sum(1)
    return distances


def _segments(
    found: Segmentation, footage: Footage, names: Sequence[str], distance: NDArray[np.float64]
) -> str:
    """Return the table of segments: recording, first and last frame, action, most typical frame."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["recording", "first", "last", "action", "typical"])
    for name, start, end in zip(footage.names, footage.starts[:-1], footage.starts[1:], strict=True):
        for action, first, stop in runs(found.path[start:end]):
            typical = first + int(distance[start + first : start + stop].argmin())
            writer.writerow([name, first, stop - 1, names[action], typical])
    return text.getvalue()


def _draw(
    found: Segmentation,
    footage: Footage,
    truth: Truth | None,
    names: Sequence[str],
    distance: NDArray[np.float64],
    count: int,
) -> list[str]:
    """Return the sections of the page: a strip for each recording, and typical frames of each action."""
    all_names = [
        *(truth.names if truth is not None else ()),
        *(n for n in names if truth is None or n not in truth.names),
    ]
    number = np.array([all_names.index(name) for name in names])
    rows = (
        {"found": number[found.path]}
        if truth is None
        else {"true": truth.actions, "found": number[found.path]}
    )
    strips = "".join(
        card(footage.names[at], _strip(rows, all_names, int(footage.starts[at]), int(footage.starts[at + 1])))
        for at in range(min(count, len(footage.names)))
    )
    colours = legend((name, class_colour(at, len(all_names))) for at, name in enumerate(all_names))
    note = f"{' above '.join(rows)}; over a box: its action and frames."
    typical = "".join(
        card(names[action], _frames(footage, np.flatnonzero(found.path == action), distance))
        for action in np.unique(found.path)
    )
    return [
        section("Which action when?", note, colours + strips),
        section("What are the actions?", "The most typical frame of each, in several recordings.", typical),
    ]


def _strip(rows: dict[str, Ints], names: Sequence[str], start: int, end: int) -> str:
    shapes: list[Shape] = []
    scale = _WIDTH / (end - start)
    for line, (title, labels) in enumerate(rows.items()):
        shapes.append(Label(_WIDTH + 6, line * (_HEIGHT + 2) + 12, title, "start"))
        for label, first, stop in runs(labels[start:end]):
            said = f"{names[label]}, {first} to {stop - 1}"
            place = (scale * first, line * (_HEIGHT + 2), scale * (stop - first), _HEIGHT)
            shapes.append(Box(*place, class_colour(label, len(names)), 1.0, said))
    return Drawing(_WIDTH + 50, len(rows) * (_HEIGHT + 2), "actions", shapes).svg()


def _frames(footage: Footage, rows: Ints, distance: NDArray[np.float64]) -> str:
    """Draw the most typical frame of each of some recordings, the most typical first."""
    best: dict[int, int] = {}
    for row in rows[distance[rows].argsort(kind="stable")].tolist():
        best.setdefault(footage.find(row)[0], row)
    shapes: list[Shape] = []
    for place, row in enumerate([*best.values()][:_TYPICAL]):
        pixels = read_or_none(footage, row)
        if pixels is not None:
            pixels = scaled(pixels, _TILE) if pixels.shape[-1] > _TILE else pixels
            shapes.append(Picture(place * (_TILE + 4), 0, _TILE, _TILE, pixels, footage.key(row)))
    return Drawing(_TYPICAL * (_TILE + 4), _TILE, "typical frames", shapes).svg()


def _page(rows: list[Row], drawing: list[str]) -> str:
    header = "<header><h1>Actions of recordings</h1></header>"
    note = "In percent; in brackets: the encoder's gain over each baseline."
    scores = section("Scores", note, table(rows[0], rows[1:])) if rows else ""
    return page("Segments · contrastive pretraining", [header, scores, *drawing])

"""Read the results in a run directory for the report."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from contrastive.config import DataConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.logging.hard_negatives import HardNegative
from eval.eval_data import place_of_result, title_of
from eval.leakage import describe_pretrained
from eval.protocol import Row, accuracy_titles, find_protocol, representations
from eval.registry import FORMER_NAMES
from eval.run_files import read_csv, read_json, refuse
from eval.stats_protocol import describe_duplicates
from eval.verdict import CONTROLS, IN_PART, WORTH

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """An accuracy in [0, 1] with its 95% interval."""

    name: str  # such as top1
    value: float
    low: float
    high: float
    interval: str  # how it was computed, and over what it varies
    others: dict[str, tuple[float, float]]  # accuracy of each other network, and the encoder's gain over it

    @property
    def gain(self) -> float:
        """Return what the encoder gains over the best baseline; itself on less of a video is none."""
        return min(gain for name, (_, gain) in self.others.items() if name not in CONTROLS)


@dataclass(frozen=True)
class Result:
    """Accuracies of one protocol."""

    scores: list[Score]
    warnings: list[str]
    pretrained: str  # how many test images were pretrained on; empty if none
    images: str  # how many, of which folder or data set, and where the test part comes from
    classes: list[str]
    fingerprint: str  # of the images
    confusion: list[list[int]] | None  # by true class, then by predicted class
    origin: str  # settings, hashes and versions, as JSON


@dataclass(frozen=True)
class Statistics:
    """Results of the stats protocol: its table, the encoder's column first, and near-duplicates."""

    table: list[Row]
    near_duplicates: str
    images: str  # how many, of which folder or data set
    fingerprint: str  # of the images


@dataclass(frozen=True)
class Answer:
    """Result of the worth protocol: its answer in a sentence, the rows of its table, and lines about them."""

    is_worth_it: bool  # at least in part
    sentence: str
    table: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Measured:
    """Results on one data set."""

    title: str  # short name of the data set; empty for the run's own
    files: dict[str, Path]  # by protocol
    results: dict[str, Result]  # by protocol
    statistics: Statistics | None
    answer: Answer | None
    attention: list[Row] | None  # table of the attention protocol: empty without masks
    isolated: list[Row] | None  # images, their nearest, cosines
    outdated: list[str]  # protocols whose results are of other weights than the run's encoder now has

    def name(self, text: str) -> str:
        """Add the data set to a text, unless it is the run's own."""
        return f"{text} on {self.title}" if self.title else text


@dataclass(frozen=True)
class Run:
    """A run directory, or the folder of another library's network that was evaluated."""

    name: str  # of the folder, or its path if two folders have the same name
    folder: Path
    settings: PretrainConfig | None  # None without config.yaml
    measured: list[Measured]  # on the run's own data, then on each other data set
    warnings: list[str]  # of training, that held at its end
    metrics: list[dict[str, str]]  # rows of metrics.csv
    identity: str  # hash of the encoder's file; without one the folder's real path

    @property
    def own(self) -> Measured:
        """Return the results on the run's own data."""
        return self.measured[0]


def read_run(folder: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        UserError: a file in it was not written by training or evaluation.
    """
    config, encoder = folder / "config.yaml", _hash_encoder(folder)
    settings = load_saved(PretrainConfig, config) if config.is_file() else None
    known = _sort_by_data(folder, None if settings is None else settings.data)
    titles = [title_of(place) if place else "" for place in known]
    return Run(
        name,
        folder,
        settings,
        [
            _measured(folder, files, title if titles.count(title) == 1 else place, encoder)
            for title, (place, files) in zip(titles, known.items(), strict=True)
        ],
        list(map(str, read_json(folder / "summary.json").get("warnings", []))),
        read_csv(folder / "metrics.csv"),
        encoder or str(folder.resolve()),
    )


def _sort_by_data(folder: Path, own: DataConfig | None) -> dict[str, dict[str, Path]]:
    """Return the results' files by the place of their images, "" for the run's own, and by protocol.

    Versions before wrote those on other images into ``eval`` itself; of two on the same, the later counts.
    """
    known: dict[str, dict[str, Path]] = {"": {}}
    names = FORMER_NAMES | {name: name for name in (*accuracy_titles(), "stats", "attention")}
    for stored, protocol in names.items():
        places = [folder / "eval", *(folder / "eval").glob("on-*")]
        for file in sorted((place / f"{stored}.json" for place in places), key=_written):
            images = _read(file, lambda raw: place_of_result(own, raw["data"]))
            if images is not None:
                known.setdefault(images, {})[protocol] = file
    return known


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


def _measured(folder: Path, files: dict[str, Path], title: str, encoder: str | None) -> Measured:
    def read(name: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
        return _read(files[name], parse) if name in files else None

    results = {name: read(name, partial(_result, name)) for name in accuracy_titles()}
    return Measured(
        title,
        files,
        {name: result for name, result in results.items() if result is not None},
        read("stats", lambda raw: _statistics(raw, files["stats"].parent.relative_to(folder))),
        read("worth", _answer),
        read("attention", find_protocol("attention").table),
        read("neighbours", _isolated),
        [] if encoder is None else _outdated(files, encoder),
    )


def repeated(runs: list[Run]) -> list[str]:
    """Return a line for each run that is there more than once: by path, by link, or as a copy."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(run.identity, []).append(run.name)
    return [
        f"The same run, or its exact repetition, {len(same)} times: {', '.join(same)}."
        for same in names.values()
        if len(same) > 1
    ]


def _hash_encoder(folder: Path) -> str | None:
    """Return the SHA-256 of the encoder's file, in hex; None if there is none yet."""
    encoder = folder / "encoder.safetensors"
    if not encoder.is_file():
        return None
    with encoder.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _outdated(files: dict[str, Path], encoder: str) -> list[str]:
    """Name the protocols whose results are not of the encoder of this hash."""
    measured = {name: read_json(file).get("encoder_sha256") for name, file in files.items()}
    return [name for name, made_of in measured.items() if made_of not in (None, encoder)]


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Parse a result; None if there is no file."""
    content = read_json(path)
    if not content:
        return None
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        refuse(path, error)


def _result(protocol: str, raw: dict[str, Any]) -> Result | None:
    """Read accuracies; None for a result without labels."""
    if not raw["data"]["classes"]:
        return None
    data, classes = raw["data"], list(map(str, raw["data"]["classes"]))
    counts = raw.get("details", {}).get("encoder", {}).get("confusion")
    if counts is not None:
        counts = [list(map(int, line)) for line in counts]
        if not classes or list(map(len, counts)) != [len(classes)] * len(classes):
            raise ValueError(f"details.encoder.confusion is not of {len(classes)} classes")
    origin = {name: value for name, value in raw.items() if name not in ("scores", "details")}
    return Result(
        [_score(row) for row in raw["scores"]],
        list(map(str, raw["warnings"])),
        describe_pretrained(raw.get("pretrained", {}), data.get("rows_are", "images")),
        _images(data, find_protocol(protocol).parts),
        classes,
        _fingerprint(data),
        counts,
        json.dumps(origin, indent=1),
    )


def _images(data: dict[str, Any], parts: tuple[str, str]) -> str:
    counts = (
        f"{int(data['rows'][name]):,} {part}" for name, part in zip(("train", "test"), parts, strict=True)
    )
    noun = data.get("rows_are", "images")  # not in results of versions before
    return f"{' and '.join(counts)} {noun} of {_origin(data)}, test part: {data['test_part']}"


def _origin(data: dict[str, Any]) -> str:
    return str(data.get("root") or data["name"])


def _score(row: dict[str, Any]) -> Score:
    value, low, high = (float(row["encoder"][name]) for name in ("value", "low", "high"))
    others = {
        name: (float(row[name]["value"]), float(row[name]["gain"]["value"]))
        for name in representations(row)
        if name != "encoder"
    }
    return Score(str(row["name"]), value, low, high, str(row["interval"]), others)


def _statistics(raw: dict[str, Any], place: Path) -> Statistics:
    pairs, data = dict(raw["near_duplicates"]), raw["data"]
    pairs["file"] = place / Path(pairs["file"]).name
    return Statistics(
        find_protocol("stats").table(raw),
        f"{describe_duplicates(pairs).capitalize()}.",
        f"{int(data['rows']['train']):,} training {data.get('rows_are', 'images')} of {_origin(data)}",
        _fingerprint(data),
    )


def _fingerprint(data: dict[str, Any]) -> str:
    return json.dumps(data["fingerprint"], sort_keys=True)


def _answer(raw: dict[str, Any]) -> Answer:
    protocol = find_protocol("worth")
    notes = [line for line in protocol.notes(raw) if line != raw["sentence"]]
    return Answer(raw["answer"] in (WORTH, IN_PART), str(raw["sentence"]), protocol.table(raw), notes)


def _isolated(raw: dict[str, Any]) -> list[Row]:
    return [
        (str(query["image"]), str(hits[0]["image"]), f"{hits[0]['similarity']:.2f}")
        for query in raw["queries"]
        if query["chosen"] == "isolated" and (hits := query["neighbours"]["encoder"])
    ]


def read_mined(path: Path) -> list[HardNegative]:
    """Read mined.csv; empty if there is no file.

    Raises:
        UserError: a row is not one of hard negatives.
    """
    found = []
    for count, row in enumerate(read_csv(path), start=1):
        try:
            found.append(HardNegative.parse(row))
        except (KeyError, TypeError, ValueError) as error:
            needed = ", ".join(HardNegative.__dataclass_fields__)
            raise UserError(f"{path}: row {count} is not of hard negatives, {needed} are needed") from error
    return found

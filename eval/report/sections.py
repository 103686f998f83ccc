"""Build the sections of a report: each is one function of ``Report``, listed in ``SECTIONS``."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any

from omegaconf import OmegaConf

from contrastive.config import DataConfig, PretrainConfig
from contrastive.drawing.canvas import Points
from contrastive.drawing.figures import interval_bar, line_chart
from contrastive.encoders.build import arch_of
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.weights import read_info
from eval.protocol import accuracy_titles
from eval.report import pictures
from eval.report.context import Report
from eval.report.page import card, details, grid, key, legend, section, table, warning
from eval.report.read import BASELINES, Result, Run, Score, describe_epochs, read_csv, read_json, repeated

_MOST_POINTS = 400  # in a curve
_COLOURS = {"raw_pixels": "s1", "random_encoder": "s2"}  # of the baselines' marks
_SCALE = '<th class="picture">0 to 100%</th>'
_FIXED = (
    "settings by a fixed rule; the linear probe chooses its own, so the two differ at 100%, baselines too"
)
_CHARTS: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...], str], ...] = (
    ("Loss", (("loss", ("train/loss",)),), ""),
    (
        "Similarity to the query",
        (
            ("positive", ("mining/positive_similarity", "train/positive_similarity")),
            ("negatives", ("mining/similarity_mean", "train/negative_similarity")),
            ("their top tenth", ("mining/similarity_q90",)),
        ),
        "negatives: the mined ones, or where none are mined all that the loss saw; "
        "how far they are apart depends on the views and the length of training too: it ranks no runs",
    ),
    (
        "Accuracy on held-out training images",
        (("kNN", ("knn/top1",)), ("linear probe", ("probe/top1",))),
        "while training, the encoder frozen meanwhile",
    ),
    (
        "Same-label share of mined negatives",
        (("same label", ("mining/same_label_rate",)),),
        "labels only watch",
    ),
    (
        "Effective rank of the keys",
        (("RankMe", ("stats/rankme",)),),
        "embeddings behind the projector, so not the rank of the features; a fall early on is usual, below "
        "5% of their dimensions is a collapse",
    ),
    ("Learning rate", (("learning rate", ("train/lr",)),), ""),
    ("Images per second", (("images/s", ("perf/images_per_s",)),), ""),
)
"""Each chart: title, curves with their columns of metrics.csv (the first one found is drawn), caption."""


def header(report: Report) -> str:
    """Show the run and its main numbers, or all runs with their colours."""
    return _one(report, report.runs[0]) if report.alone else _several(report.runs)


def _one(report: Report, run: Run) -> str:
    settings = run.settings
    assert settings is not None  # a run directory
    data = settings.data
    summary = (
        f"{_network(run, settings)}, on {_images(run, data)} at {data.image_size} px without labels: "
        f"{describe_epochs(run.folder, settings.schedule)} in batches of {data.global_batch}, "
        f"method {settings.method}, loss {settings.objective.name}."
    )
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(report, run)
    )
    intro = f'<h1>{escape(run.name)}</h1><p class="muted">{escape(summary)}</p>'
    warnings = "".join(map(warning, [*_outdated(run), *run.warnings])) + _overruled(run)
    return f'<header>{intro}<dl class="facts">{cells}</dl></header>{warnings}'


def _images(run: Run, data: DataConfig) -> str:
    """Name the folder or the source that the run was trained on, its number of images, and those left out."""
    listed, left_out = (len(read_csv(run.folder / name)) for name in ("manifest.csv", "corrupt.csv"))
    noun = "videos" if data.name == "clips" or data.frames > 1 else "images"
    count = f"{listed:,} {noun} of " if listed else ""
    lacking = f" ({left_out:,} left out, see corrupt.csv)" if left_out else ""
    return f"{count}{data.root or data.name}{lacking}"


def worth(report: Report) -> str:
    """Show the sentence and the table of the worth protocol, for one run."""
    answer = report.runs[0].answer
    if not report.alone or answer is None:
        return ""
    names, *baselines, ours = answer.table
    head, *rows = zip(names, ours, *baselines, strict=True)  # a column for each network: there are few
    statistics, measured = report.runs[0].statistics, report.runs[0].results.get("worth")
    below = {row[0] for row in statistics.table} if statistics is not None else set()
    rows = [row for row in rows if row[0] not in below]
    pictures = [_SCALE, *map(_bar, measured.scores)] if measured is not None else []
    below_table = ""
    if measured is not None:
        images = f'<p class="note">{escape(measured.images)}</p>'
        below_table = _baselines_legend() + images + "".join(map(warning, measured.warnings))
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in answer.notes)
    earlier = "Of an earlier encoder, evaluate again. " if "worth" in report.runs[0].outdated else ""
    return section(
        "Was it worth it?",
        earlier + answer.sentence,
        table(head, rows, "", pictures) + notes + below_table,
    )


def _overruled(run: Run) -> str:
    """Say that warnings of training are older than an evaluation that disagrees."""
    if not run.warnings or run.answer is None or not run.answer.is_worth_it or "worth" in run.outdated:
        return ""
    text = "Training warned of this by what it saw until its end; the evaluation below is later and decides."
    return f'<p class="note">{text}</p>'


def _outdated(run: Run) -> list[str]:
    """Warn of results of other weights than the run's."""
    return [f"Of an earlier encoder: {', '.join(run.outdated)}; evaluate again."] if run.outdated else []


def _network(run: Run, settings: PretrainConfig) -> ArchSpec:
    """Describe the network by its file, or by the config if there is no file yet."""
    file = run.folder / "encoder.safetensors"
    return read_info(file).arch if file.is_file() else arch_of(settings.encoder)


def _facts(report: Report, run: Run) -> Iterator[tuple[str, str]]:
    for protocol, result in run.results.items():
        if protocol == "worth" and "linear" in run.results:
            continue  # the same probe
        # Lowshot shows its score at 10% if there is one; every other protocol its first score.
        tenth = [score for score in result.scores if protocol == "lowshot" and score.name.endswith(" 10%")]
        for score in (tenth or result.scores)[:1]:
            yield _named(protocol, score), f"{100 * score.value:.1f}%"
    if report.map is not None and run.statistics is None:  # which has them of the training images
        verdict = report.map.health.verdict  # of their spread, so it says nothing of their use
        yield "test features", "no collapse" if verdict == "healthy" else verdict
        yield (
            "effective rank of the test features",
            f"{report.map.health.rankme:.0f} of {report.map.full_rank}",
        )
    if isinstance(seconds := read_json(run.folder / "summary.json").get("seconds"), int | float):
        yield "training time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _named(protocol: str, score: Score) -> str:
    """Name a score; those of ``worth`` name themselves, and their best baseline is in reach."""
    if protocol != "worth":
        return f"{accuracy_titles()[protocol].lower()}, {score.name}"
    return (
        f"{score.name}, {100 * min(gain for _, gain in score.baselines.values()):+.1f} over the best baseline"
    )


def _several(runs: list[Run]) -> str:
    items = "".join(
        f"<li>{key(f's{place}')}<b>{escape(run.name)}</b> "
        f'<span class="muted">{escape(_length(run) + str(run.folder))}</span></li>'
        for place, run in enumerate(runs)
    )
    warnings = repeated(runs)
    data = {run.name: run.settings.data.name for run in runs if run.settings}
    if len({*data.values()}) > 1:
        listed = ", ".join(f"{run} on {name}" for run, name in data.items())
        warnings.append(f"Not all runs trained on the same data, so their curves do not compare: {listed}.")
    if bare := [run.name for run in runs if not run.results]:
        warnings.append(f"Not evaluated yet, so without scores: {', '.join(bare)}.")
    warnings += [f"{run.name}: {text}" for run in runs for text in [*_outdated(run), *run.warnings]]
    lines = "".join(map(warning, warnings))
    return f'<header><h1>{len(runs)} runs compared</h1><ul class="runs">{items}</ul></header>{lines}'


def _length(run: Run) -> str:
    """Say how long a run trained, which may explain more than what was set; nothing of other libraries'."""
    if run.settings is None:
        return ""
    steps = read_json(run.folder / "summary.json").get("steps")
    taken = f", {steps:,} steps" if isinstance(steps, int) else ""
    return f"{describe_epochs(run.folder, run.settings.schedule)}{taken}; "


def scores(report: Report) -> str:
    """Show every accuracy with its interval: one run beside the baselines, or the runs beside each other."""
    if not any(run.results for run in report.runs):
        return ""
    return _beside_baselines(report.runs[0]) if report.alone else _beside_each_other(report.runs)


def _beside_baselines(run: Run) -> str:
    results = {name: result for name, result in run.results.items() if name != "worth"}  # shown above
    if not results:
        return ""
    lines, before = [], ""
    for protocol, result in results.items():
        about = _FIXED if any(score.name.endswith(" 100%") for score in result.scores) else ""
        about = "; ".join(filter(None, [result.images if result.images != before else "", about]))
        before = result.images
        title = f"{accuracy_titles()[protocol]} <small>{escape(about)}</small>"
        lines.append(f'<tr class="group"><td colspan="5">{title}</td></tr>')
        lines += [_score_row(escape(score.name), score, baselines=True) for score in result.scores]
    names = ("score, %", "encoder", *BASELINES.values())
    head = "".join(f"<th>{name}</th>" for name in names) + _SCALE
    warnings = "".join(warning(text) for result in results.values() for text in result.warnings)
    note = (
        "Frozen features; in brackets what the encoder gains over that baseline on the same splits. "
        f"{_intervals(results.values())}."
    )
    body = f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    return section("How good are the features?", note, f"{body}{_baselines_legend()}{warnings}")


def _baselines_legend() -> str:
    keys = [("encoder, 95% interval", "s0"), *((BASELINES[name], _COLOURS[name]) for name in BASELINES)]
    return f'<p class="note picture">{legend(keys)}</p>'


def _intervals(results: Iterable[Result]) -> str:
    """Say what the intervals are, as the protocols do below their tables."""
    kinds = dict.fromkeys(score.interval for result in results for score in result.scores)
    return f"95% intervals: {'; '.join(kinds)}"


def _beside_each_other(runs: list[Run]) -> str:
    """Return a card for each score that several runs have of the same images."""
    titles, shared = accuracy_titles(), dict[tuple[str, str, str], list[str]]()
    for place, run in enumerate(runs):
        for protocol, result in run.results.items():
            for score in result.scores:
                row = _score_row(f"{key(f's{place}')}{escape(run.name)}", score, f"s{place}")
                shared.setdefault((protocol, score.name, result.fingerprint), []).append(row)
    cards = [
        card(
            name if protocol == "worth" else f"{titles[protocol]}: {name}",
            f'<table class="runs">{"".join(rows)}</table>',
            "bar from 0 to 100%, 95% interval",
        )
        for (protocol, name, _), rows in sorted(shared.items(), key=lambda item: [*titles].index(item[0][0]))
        if len(rows) > 1
    ]
    note = (
        "Frozen features on the test part, except where fine-tuned; in %. What one run alone has is in its "
        f"own report. {_intervals(result for run in runs for result in run.results.values())}."
    )
    return section("How good are they?", note, _unlike(runs) + grid(cards))


def _score_row(label: str, score: Score, colour: str = "s0", *, baselines: bool = False) -> str:
    """Return a row; ``label`` is HTML."""
    interval = f"{100 * score.low:.1f}–{100 * score.high:.1f}"
    cells = f'<td>{label}</td><td class="own">{100 * score.value:.1f} <small>{interval}</small></td>'
    for value, gain in score.baselines.values() if baselines else ():
        cells += f"<td>{100 * value:.1f} <small>({100 * gain:+.1f})</small></td>"
    return f"<tr>{cells}{_bar(score, colour, baselines=baselines)}</tr>"


def _bar(score: Score, colour: str = "s0", *, baselines: bool = True) -> str:
    """Return a cell with the score as a bar."""
    own = score.baselines.items() if baselines else ()
    marks = [(BASELINES[name], value, _COLOURS[name]) for name, (value, _) in own]
    return f'<td class="picture">{interval_bar(score.value, score.low, score.high, marks, colour).svg()}</td>'


def _unlike(runs: list[Run]) -> str:
    """Warn of protocols whose scores are not of the same images in all runs."""
    told: dict[str, list[str]] = {}
    for protocol, title in accuracy_titles().items():
        groups: dict[str, list[str]] = {}
        for run in runs:
            if (result := run.results.get(protocol)) is not None:
                groups.setdefault(result.fingerprint, []).append(f"{run.name} on {result.images}")
        if len(groups) > 1:
            told.setdefault("; ".join(map(", ".join, groups.values())), []).append(title.lower())
    return "".join(
        warning(f"Not of the same images, so they do not compare ({', '.join(titles)}): {text}.")
        for text, titles in told.items()
    )


def curves(report: Report) -> str:
    """Draw metrics.csv: for one run several metrics a chart, for several runs one metric."""
    cards = []
    for title, series, caption in _charts(report.runs):
        if any(points for _, points in series):
            keys = [(name, f"s{n}") for n, (name, points) in enumerate(series) if points]
            parts = [legend(keys) if len(series) > 1 else "", escape(caption)]
            cards.append(card(title, line_chart(series).svg(), "<br>".join(filter(None, parts))))
    if not cards:
        return ""
    title, note = ("How did it learn?", "Over epochs, from metrics.csv.")
    if not report.alone:
        title, note = ("How did they learn?", "Over epochs, from each metrics.csv.")
    return section(title, note, grid(cards))


def _charts(runs: list[Run]) -> Iterator[tuple[str, list[tuple[str, Points]], str]]:
    for title, columns, caption in _CHARTS:
        if len(runs) == 1:
            yield title, [(name, curve(runs[0], spellings)) for name, spellings in columns], caption
            continue
        for name, spellings in columns:
            heading = title if len(columns) == 1 else f"{title}: {name}"
            yield heading, [(run.name, curve(run, spellings)) for run in runs], caption


def curve(run: Run, spellings: tuple[str, ...]) -> Points:
    """Return (epoch, value) of the first column with values, without empty and non-finite cells."""
    for column in spellings:
        pairs = [(_number(row.get("epoch")), _number(row.get(column))) for row in run.metrics]
        found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if found:
            return found[:: max(1, len(found) // _MOST_POINTS)]
    return []


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def health(report: Report) -> str:
    """Show the stats protocol: one run beside the baselines, with its near-duplicates, or several runs."""
    known = {run.name: run.statistics for run in report.runs if run.statistics is not None}
    if len(known) < (1 if report.alone else 2):
        return ""
    if report.alone:
        (found,) = known.values()
        head, *rows = found.table
        body = table(head, rows) + f'<p class="note">{escape(found.near_duplicates)}</p>'
    else:
        lines = zip(*(found.table[1:] for found in known.values()), strict=True)
        rows = [(line[0][0], *(row[1] for row in line)) for line in lines]
        body = table(["", *known], rows, "set")
    return section("Are the features healthy?", "Features of training images, before the projector.", body)


def differences(report: Report) -> str:
    """List the settings that are not the same in all runs."""
    known = {run.name: dict(_flat(run.settings)) for run in report.runs if run.settings is not None}
    if len(known) < 2:
        return ""
    values = {
        name: [settings.get(name, "") for settings in known.values()]
        for name in dict.fromkeys(name for settings in known.values() for name in settings)
        if name != "run.name" and not name.startswith("chosen")  # reasons, whose settings are here
    }
    rows = [
        [name, *own]
        for name, own in values.items()
        if len({*own}) > 1 and own != values.get(name.replace("view_2", "view_1") if "view_2" in name else "")
    ]
    note = "Every other setting of their config.yaml is the same." if rows else "Their settings are the same."
    return section("What differs?", note, table(["", *known], rows, "set keys") if rows else "")


def _flat(settings: PretrainConfig) -> Iterator[tuple[str, str]]:
    def walk(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for name, each in value.items():
                yield from walk(each, f"{prefix}.{name}".lstrip("."))
        else:
            yield prefix, json.dumps(value)

    return walk(OmegaConf.to_container(OmegaConf.structured(settings)), "")


def origin(report: Report) -> str:
    """Show every setting, hash and version, folded up."""
    texts = {}
    for run in report.runs:
        before = "" if report.alone else f"{run.name}: "
        if (config := run.folder / "config.yaml").is_file():
            texts[f"{before}config.yaml"] = config.read_text()
        texts |= {f"{before}eval/{name}.json": result.origin for name, result in run.results.items()}
    return section("What produced this?", "Every setting, hash and version.", details(texts))


Section = Callable[[Report], str]
"""Return HTML, or "" if there is nothing to show; add what cannot be drawn to ``Report.missing``."""

SECTIONS: tuple[Section, ...] = (
    header,
    worth,
    scores,
    curves,
    health,
    pictures.views,
    pictures.gallery,
    pictures.attention,
    pictures.isolated,
    pictures.mistakes,
    pictures.unreadable,
    differences,
    origin,
)
"""Sections of the page, from top to bottom. To add a section, write a function and list it here."""

"""Build the sections of a report: each is one function of ``Report``, listed in ``SECTIONS``."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict
from html import escape

from contrastive.config import DataConfig, PretrainConfig
from contrastive.config_files import flat
from contrastive.drawing.canvas import SERIES, Points
from contrastive.drawing.figures import interval_bar, line_chart
from contrastive.encoders.build import arch_of
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.weights import read_info
from eval.pages.page import card, details, grid, key, legend, section, table, warning
from eval.protocol import accuracy_titles
from eval.report import pictures
from eval.report.context import Report
from eval.report.read import (
    Measured,
    Result,
    Run,
    Score,
    Statistics,
    repeated,
)
from eval.run_files import describe_epochs, read_csv, read_json, read_number
from eval.verdict import title as network_title

_MOST_POINTS = 400  # in a curve
_FEW = 2  # other networks whose numbers fit beside their brackets
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
    return "".join(map(_worth, report.runs[0].measured)) if report.alone else ""


def _worth(found: Measured) -> str:
    answer, statistics, measured = found.answer, found.statistics, found.results.get("worth")
    if answer is None:
        return ""
    names, *baselines, ours = answer.table
    head, *rows = zip(names, ours, *baselines, strict=True)  # a column for each network: there are few
    below = {row[0] for row in statistics.table} if statistics is not None else set()
    rows = [row for row in rows if row[0] not in below]
    others = _others([measured] if measured is not None else [])
    pictures = [_SCALE, *(_bar(score, others) for score in measured.scores)] if measured is not None else []
    below_table = ""
    if measured is not None:
        images = f'<p class="note">{escape(measured.images)}</p>'
        below_table = _legend(others) + images + "".join(map(warning, measured.warnings))
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in answer.notes)
    earlier = "Of an earlier encoder, evaluate again. " if "worth" in found.outdated else ""
    return section(
        f"{found.name('Was it worth it')}?",
        earlier + answer.sentence,
        table(head, rows, _kind(baselines), pictures) + notes + below_table,
    )


def _overruled(run: Run) -> str:
    """Say that warnings of training are older than an evaluation that disagrees."""
    judged = next((found for found in run.measured if found.answer is not None), run.own)
    if not run.warnings or judged.answer is None or not judged.answer.is_worth_it:
        return ""
    if "worth" in judged.outdated:
        return ""
    text = "Training warned of this by what it saw until its end; the evaluation below is later and decides."
    return f'<p class="note">{text}</p>'


def _outdated(run: Run) -> list[str]:
    """Warn of results of other weights than the run's."""
    names = [found.name(protocol) for found in run.measured for protocol in found.outdated]
    return [f"Of an earlier encoder: {', '.join(names)}; evaluate again."] if names else []


def _network(run: Run, settings: PretrainConfig) -> ArchSpec:
    """Describe the network by its file, or by the config if there is no file yet."""
    file = run.folder / "encoder.safetensors"
    return read_info(file).arch if file.is_file() else arch_of(settings.encoder)


def _facts(report: Report, run: Run) -> Iterator[tuple[str, str]]:
    for found in run.measured:
        for protocol, result in found.results.items():
            if found.title and protocol in run.own.results:
                continue  # the run's own data counts
            if protocol == "worth" and "linear" in found.results:
                continue  # the same probe
            # Lowshot shows its score at 10% if there is one; every other protocol its first score.
            tenth = [each for each in result.scores if protocol == "lowshot" and each.name.endswith(" 10%")]
            for score in (tenth or result.scores)[:1]:
                caveat = f" ({result.pretrained})" if result.pretrained else ""
                yield found.name(_named(protocol, score)) + caveat, f"{100 * score.value:.1f}%"
    if report.map is not None and run.own.statistics is None:  # which has the same two
        verdict = report.map.health.verdict  # of their spread, so it says nothing of their use
        yield "training features", "no collapse" if verdict == "healthy" else verdict
        yield "effective rank of the training features", f"{report.map.health.rankme:.1f} of {report.map.dim}"
    if isinstance(seconds := read_json(run.folder / "summary.json").get("seconds"), int | float):
        yield "training time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _named(protocol: str, score: Score) -> str:
    """Name a score; those of ``worth`` name themselves, and their best baseline is in reach."""
    if protocol != "worth":
        return f"{accuracy_titles()[protocol].lower()}, {score.name}"
    return f"{score.name}, {100 * score.gain:+.1f} over the best baseline"


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
    if bare := [run.name for run in runs if not any(found.results for found in run.measured)]:
        warnings.append(f"Not evaluated with labels yet, so without scores: {', '.join(bare)}.")
    warnings += [
        f"{run.name}: {text}" for run in runs for text in [*_outdated(run), *_seen(run), *run.warnings]
    ]
    lines = "".join(map(warning, warnings))
    return f'<header><h1>{len(runs)} runs compared</h1><ul class="runs">{items}</ul></header>{lines}'


def _seen(run: Run) -> list[str]:
    """Warn of scores on images that the run was pretrained on, which are not those of unseen ones."""
    return [
        f"{found.name(accuracy_titles()[protocol])}: {result.pretrained}."
        for found in run.measured
        for protocol, result in found.results.items()
        if result.pretrained
    ]


def _length(run: Run) -> str:
    """Say how long a run trained, which may explain more than what was set; nothing of other libraries'."""
    if run.settings is None:
        return ""
    steps = read_json(run.folder / "summary.json").get("steps")
    taken = f", {steps:,} steps" if isinstance(steps, int) else ""
    return f"{describe_epochs(run.folder, run.settings.schedule)}{taken}; "


def scores(report: Report) -> str:
    """Show every accuracy with its interval: one run beside the baselines, or the runs beside each other."""
    if not any(found.results for run in report.runs for found in run.measured):
        return ""
    return _beside_baselines(report.runs[0]) if report.alone else _beside_each_other(report.runs)


def _beside_baselines(run: Run) -> str:
    titles = accuracy_titles()
    results = [
        (found.name(titles[protocol]), result)
        for found in run.measured
        for protocol, result in found.results.items()
        if protocol != "worth"  # shown above
    ]
    if not results:
        return ""
    others = _others([result for _, result in results])
    lines, before = [], ""
    for name, result in results:
        about = _FIXED if any(score.name.endswith(" 100%") for score in result.scores) else ""
        about = "; ".join(filter(None, [result.images if result.images != before else "", about]))
        before = result.images
        title = f"{escape(name)} <small>{escape(about)}</small>"
        lines.append(f'<tr class="group"><td colspan="{3 + len(others)}">{title}</td></tr>')
        lines += [_score_row(escape(score.name), score, others) for score in result.scores]
    names = ("score, %", "ours", *map(network_title, others))
    head = "".join(f"<th>{escape(name)}</th>" for name in names) + _SCALE
    warnings = "".join(warning(text) for _, result in results for text in result.warnings)
    note = (
        "Frozen features; in brackets what the encoder gains over that baseline on the same splits. "
        f"{_intervals(result for _, result in results)}."
    )
    rows = f"<tr>{head}</tr>{''.join(lines)}"
    body = f'<div class="scroll"><table class="{_kind(others)}">{rows}</table></div>'
    return section("How good are the features?", note, f"{body}{_legend(others)}{warnings}")


def _kind(others: Sized) -> str:
    """Return the kind of a table with a column for each other network."""
    return "many" if len(others) > _FEW else ""


def _others(results: Iterable[Result]) -> dict[str, str]:
    """Return the networks beside the encoder, with the colours of their marks."""
    scores = [score for result in results for score in result.scores]
    names = dict.fromkeys(name for score in scores for name in score.others)
    return {name: f"s{1 + place % (SERIES - 1)}" for place, name in enumerate(names)}


def _legend(others: Mapping[str, str]) -> str:
    keys = [("ours, 95% interval", "s0"), *((network_title(name), colour) for name, colour in others.items())]
    return f'<p class="note picture">{legend(keys)}</p>'


def _intervals(results: Iterable[Result]) -> str:
    """Say what the intervals are, as the protocols do below their tables."""
    kinds = dict.fromkeys(score.interval for result in results for score in result.scores)
    return f"95% intervals: {'; '.join(kinds)}"


def _beside_each_other(runs: list[Run]) -> str:
    """Return a card for each score that several runs have of the same images, below the images' name."""
    results = [(place, protocol, result) for place, run in enumerate(runs) for protocol, result in _all(run)]
    images: dict[str, list[tuple[int, str, Result]]] = {}
    for each in results:
        images.setdefault(each[2].fingerprint, []).append(each)
    body = "".join(_of_same_images(runs, same) for same in images.values())
    note = (
        "Frozen features on the test part, except where fine-tuned; in %. What one run alone has is in its "
        f"own report. {_intervals(result for _, _, result in results)}."
    )
    return section("How good are they?", note, _unlike(runs) + body)


def _all(run: Run) -> Iterator[tuple[str, Result]]:
    """Yield the results on all data sets with their protocols."""
    for found in run.measured:
        yield from found.results.items()


def _of_same_images(runs: list[Run], results: list[tuple[int, str, Result]]) -> str:
    titles, rows = accuracy_titles(), dict[tuple[str, str], dict[int, str]]()
    for place, protocol, result in results:
        for score in result.scores:
            row = _score_row(f"{key(f's{place}')}{escape(runs[place].name)}", score, {}, f"s{place}")
            rows.setdefault((protocol, score.name), {})[place] = row
    cards = [
        card(
            name if protocol == "worth" else f"{titles[protocol]}: {name}",
            f'<table class="runs">{"".join(of_runs.values())}</table>',
            "bar from 0 to 100%, 95% interval",
        )
        for (protocol, name), of_runs in sorted(rows.items(), key=lambda item: [*titles].index(item[0][0]))
        if len(of_runs) > 1
    ]
    about = "; ".join(dict.fromkeys(result.images for _, _, result in results))
    return f'<p class="note">{escape(about)}</p>{grid(cards)}' if cards else ""


def _score_row(label: str, score: Score, others: Mapping[str, str], colour: str = "s0") -> str:
    """Return a row with a cell for each other network; ``label`` is HTML."""
    interval = f"{100 * score.low:.1f}–{100 * score.high:.1f}"
    cells = f'<td>{label}</td><td class="own">{100 * score.value:.1f} <small>{interval}</small></td>'
    for name in others:
        number = ""
        if name in score.others:
            value, gain = score.others[name]
            number = f"{100 * value:.1f} <small>({100 * gain:+.1f})</small>"
        cells += f"<td>{number}</td>"
    return f"<tr>{cells}{_bar(score, others, colour)}</tr>"


def _bar(score: Score, others: Mapping[str, str], colour: str = "s0") -> str:
    """Return a cell with the score as a bar, and those of other networks as marks in their colours."""
    marks = [
        (network_title(name), score.others[name][0], own)
        for name, own in others.items()
        if name in score.others
    ]
    return f'<td class="picture">{interval_bar(score.value, score.low, score.high, marks, colour).svg()}</td>'


def _unlike(runs: list[Run]) -> str:
    """Warn of protocols whose scores are not of the same images in all runs."""
    told: dict[str, list[str]] = {}
    for protocol, title in accuracy_titles().items():
        groups: dict[str, dict[str, str]] = {}
        for run in runs:
            for result in (found.results.get(protocol) for found in run.measured):
                if result is not None:
                    groups.setdefault(result.fingerprint, {})[run.name] = result.images
        if text := _apart(groups):
            told.setdefault(text, []).append(title.lower())
    return "".join(_warn_of_unlike(", ".join(titles), text) for text, titles in told.items())


def _apart(groups: dict[str, dict[str, str]]) -> str:
    """Describe the images of each run, by fingerprint and run; empty if all have some images in common."""
    names = {name for group in groups.values() for name in group}
    if any(names == {*group} for group in groups.values()):
        return ""
    return "; ".join(
        ", ".join(f"{name} on {images}" for name, images in group.items()) for group in groups.values()
    )


def _warn_of_unlike(what: str, text: str) -> str:
    return warning(f"Not of the same images, so they do not compare ({what}): {text}.")


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
        pairs = [(read_number(row.get("epoch")), read_number(row.get(column))) for row in run.metrics]
        found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if found:
            return found[:: max(1, len(found) // _MOST_POINTS)]
    return []


def health(report: Report) -> str:
    """Show the stats protocol: one run beside the baselines, with its near-duplicates, or several runs."""
    if report.alone:
        return "".join(map(_health, report.runs[0].measured))
    groups: dict[str, dict[str, Statistics]] = {}
    for run in report.runs:
        for statistics in (found.statistics for found in run.measured):
            if statistics is not None:
                groups.setdefault(statistics.fingerprint, {})[run.name] = statistics
    text = _apart({key: {name: each.images for name, each in known.items()} for key, known in groups.items()})
    body = "".join(_healths(known) for known in groups.values() if len(known) > 1)
    body = (_warn_of_unlike("health", text) if text else "") + body
    return section("Are the features healthy?", "Before the projector.", body) if body else ""


def _health(found: Measured) -> str:
    statistics = found.statistics
    if statistics is None:
        return ""
    head, *rows = statistics.table
    body = table(head, rows) + f'<p class="note">{escape(statistics.near_duplicates)}</p>'
    note = f"Features of {statistics.images}, before the projector."
    return section(f"{found.name('Are the features healthy')}?", note, body)


def _healths(known: dict[str, Statistics]) -> str:
    """Return a table of the statistics of several runs, of the same images, below the images' name."""
    lines = zip(*(statistics.table[1:] for statistics in known.values()), strict=True)
    rows = [(line[0][0], *(row[1] for row in line)) for line in lines]
    about = "; ".join(dict.fromkeys(statistics.images for statistics in known.values()))
    return f'<p class="note">{escape(about)}</p>{table(["", *known], rows, "set")}'


def differences(report: Report) -> str:
    """List the settings that are not the same in all runs."""
    known = {
        run.name: {name: json.dumps(value) for name, value in flat(asdict(run.settings)).items()}
        for run in report.runs
        if run.settings is not None
    }
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


def origin(report: Report) -> str:
    """Show every setting, hash and version, folded up."""
    texts = {}
    for run in report.runs:
        before = "" if report.alone else f"{run.name}: "
        if (config := run.folder / "config.yaml").is_file():
            texts[f"{before}config.yaml"] = config.read_text()
        for found in run.measured:
            for name, result in found.results.items():
                texts[f"{before}{found.files[name].relative_to(run.folder)}"] = result.origin
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

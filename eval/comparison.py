"""comparison-NAMES-HASH.html: several runs on one page: scores, curves, and the settings that differ."""

import hashlib
import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.encoders.foreign import parse_foreign
from eval.config import EvalConfig
from eval.features import open_results, write_text
from eval.figures import interval_bar, line_chart
from eval.page import SERIES, card, legend, page, section
from eval.run_files import CHARTS, STATISTICS, TITLES, points, read_csv, read_results, read_stats, statistic

_NAME_LENGTH = 40  # characters of a file's name that are of the runs


@dataclass(frozen=True)
class Run:
    """What is known of one run, or of another library's network that was evaluated.

    Attributes:
        name: Of its folder, or the path where two folders have one name.
        folder: Where it is.
        results: Accuracies by protocol.
        stats: Of the stats protocol; may be empty.
        metrics: Rows of metrics.csv; may be empty.
        settings: Every setting by its dotted name; empty without config.yaml.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    stats: dict[str, Any]
    metrics: list[dict[str, str]]
    settings: dict[str, str]


def write_comparison(config: EvalConfig) -> dict[str, Any]:
    """Write the page beside the first of ``checkpoint`` and ``compare``, or into ``out``.

    Raises:
        UserError: a path that holds neither a run nor results, more of them than there are colours, or the
            page cannot be written.
    """
    runs = read_runs([config.checkpoint, *config.compare])
    folder = Path(config.out) if config.out else runs[0].folder.absolute().parent
    target = folder / file_name(runs)
    open_results(folder)
    text = build(runs)
    write_text(target, text)
    names = [run.name for run in runs]
    return {"protocol": "report", "file": str(target), "bytes": len(text.encode()), "runs": names}


def file_name(runs: list[Run]) -> str:
    """Name of the page: the same for the same runs, and never that of another comparison."""
    names = "-".join(run.folder.absolute().name for run in runs)[:_NAME_LENGTH]
    folders = "\0".join(str(run.folder.resolve()) for run in runs)
    return f"comparison-{names}-{hashlib.sha256(os.fsencode(folders)).hexdigest()[:8]}.html"


def read_runs(paths: list[str]) -> list[Run]:
    """One for each path.

    Raises:
        UserError: see ``write_comparison``, or results that an evaluation did not write.
    """
    if len(paths) > SERIES:
        raise UserError(f"report: {len(paths)} runs given, up to {SERIES} can be told apart; compare fewer")
    folders = [_folder(path) for path in paths]
    names = [folder.absolute().name for folder in folders]
    return [
        Run(
            name if names.count(name) == 1 else path,
            folder,
            read_results(folder),
            read_stats(folder),
            read_csv(folder / "metrics.csv"),
            _settings(folder / "config.yaml"),
        )
        for path, name, folder in zip(paths, names, folders, strict=True)
    ]


def _folder(path: str) -> Path:
    foreign = parse_foreign(path)
    folder = Path("runs") / foreign.slug if foreign is not None else Path(path)
    if not (folder / "config.yaml").is_file() and not any((folder / "eval").glob("*.json")):
        raise UserError(
            f"report: {path} holds neither config.yaml nor results in eval/; give run directories "
            "(runs/NAME), or evaluate it first"
        )
    return folder


def _settings(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    saved: Any = OmegaConf.to_container(OmegaConf.structured(load_saved(PretrainConfig, path)))
    return dict(_flat(saved))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for name, each in value.items() for pair in _flat(each, f"{prefix}.{name}".lstrip("."))]
    return [(prefix, json.dumps(value))]


def build(runs: list[Run]) -> str:
    """The document."""
    sections = [_header(runs), _scores(runs), _curves(runs), _health(runs), _differences(runs), _origin(runs)]
    return page(f"{len(runs)} runs · contrastive pretraining", sections)


def _header(runs: list[Run]) -> str:
    items = "".join(
        f"<li>{_key(place)}<b>{escape(run.name)}</b> "
        f'<span class="muted">{escape(str(run.folder))}</span></li>'
        for place, run in enumerate(runs)
    )
    return f'<header><h1>{len(runs)} runs compared</h1><ul class="runs">{items}</ul></header>{_told(runs)}'


def _told(runs: list[Run]) -> str:
    """Warnings: runs that trained on other data, and those without scores."""
    data = [f"{run.name} on {json.loads(run.settings['data.name'])}" for run in runs if run.settings]
    told = []
    if len({run.settings["data.name"] for run in runs if run.settings}) > 1:
        told.append(
            f"Not all runs trained on the same data, so their curves do not compare: {', '.join(data)}."
        )
    if bare := [run.name for run in runs if not run.results]:
        told.append(f"Not evaluated yet, so without scores: {', '.join(bare)}.")
    return "".join(f'<p class="note warning">{escape(text)}</p>' for text in told)


def _key(place: int) -> str:
    return f'<span class="key" style="background:var(--s{place})"></span>'


def _scores(runs: list[Run]) -> str:
    cards = []
    for protocol, title in TITLES.items():
        by_run = [
            {row["name"]: row["encoder"] for row in run.results.get(protocol, {}).get("scores", [])}
            for run in runs
        ]
        names = list(dict.fromkeys(name for scores in by_run for name in scores))
        values = [score["value"] for scores in by_run for score in scores.values()]
        floor = max(0.0, int(10 * min(values, default=0.0) - 0.5) / 10)
        for name in names:
            rows = [
                _score_row(place, run, scores[name], floor)
                for place, (run, scores) in enumerate(zip(runs, by_run, strict=True))
                if name in scores
            ]
            body = f'<table class="runs">{"".join(rows)}</table>'
            cards.append(card(f"{title}: {name}", body, f"bar from {100 * floor:.0f} to 100%, 95% interval"))
    if not cards:
        return ""
    note = "Frozen features on the test part, except where fine-tuned; in %."
    return section("How good are they?", note, _unlike(runs) + f'<div class="grid2">{"".join(cards)}</div>')


def _score_row(place: int, run: Run, score: dict[str, float], floor: float) -> str:
    value, low, high = (score[name] for name in ("value", "low", "high"))
    picture = interval_bar(value, low, high, [], floor, series=place)
    return (
        f"<tr><td>{_key(place)}{escape(run.name)}</td>"
        f'<td class="own">{100 * value:.1f} <small>{100 * low:.1f}–{100 * high:.1f}</small></td>'
        f'<td class="picture">{picture}</td></tr>'
    )


def _unlike(runs: list[Run]) -> str:
    """A warning where scores are not of the same images."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        for result in run.results.values():
            key = json.dumps(result["data"]["fingerprint"], sort_keys=True)
            seen.setdefault(key, []).append(f"{run.name} on {result['data']['name']}")
    if len(seen) < 2:
        return ""
    groups = "; ".join(", ".join(dict.fromkeys(names)) for names in seen.values())
    return (
        f'<p class="note warning">Not all scores are of the same images, so they do not compare: '
        f"{escape(groups)}.</p>"
    )


def _curves(runs: list[Run]) -> str:
    cards = []
    for title, columns, caption in CHARTS:
        for name, spellings in columns:
            series = [(run.name, points(run.metrics, spellings)) for run in runs]
            if any(found for _, found in series):
                keys = [(run, f"var(--s{n})") for n, (run, found) in enumerate(series) if found]
                heading = title if len(columns) == 1 else f"{title}: {name}"
                below = legend(keys) + (f"<br>{escape(caption)}" if caption else "")
                cards.append(card(heading, line_chart(series), below))
    if not cards:
        return ""
    note = "Over epochs, from each metrics.csv."
    return section("How did they learn?", note, f'<div class="grid2">{"".join(cards)}</div>')


def _health(runs: list[Run]) -> str:
    known = [run for run in runs if run.stats]
    if not known:
        return ""
    rows = []
    for key, title in STATISTICS.items():
        rows.append([title, *(statistic(run.stats["scores"]["encoder"][key]) for run in known)])
    note = "Features of training images, before the projector."
    return section("Are the features healthy?", note, _table(known, rows))


def _differences(runs: list[Run]) -> str:
    known = [run for run in runs if run.settings]
    names = list(dict.fromkeys(name for run in known for name in run.settings))
    rows = [[name, *(run.settings.get(name, "") for run in known)] for name in names if name != "run.name"]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if len(known) < 2:
        return ""
    note = "Every other setting of their config.yaml is the same." if rows else "Their config.yaml are alike."
    return section("What differs?", note, _table(known, rows) if rows else "")


def _table(runs: list[Run], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("", *(run.name for run in runs)))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="set"><tr>{head}</tr>{body}</table></div>'


def _origin(runs: list[Run]) -> str:
    found = []
    for run in runs:
        for protocol, result in run.results.items():
            kept = {name: value for name, value in result.items() if name not in ("scores", "details")}
            text = escape(json.dumps(kept, indent=1))
            found.append(
                f"<details><summary>{escape(run.name)}: {protocol}</summary><pre>{text}</pre></details>"
            )
    return section("What produced this?", "Every setting, hash and version.", "".join(found)) if found else ""

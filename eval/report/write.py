"""Write the report: report.html for one run, comparison-NAMES-HASH.html for several."""

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrastive.config import UserError, check_path
from contrastive.drawing.canvas import SERIES
from contrastive.encoders.foreign import parse_foreign
from eval.config import EvalConfig
from eval.frozen import resolve
from eval.pages.page import page, warning
from eval.protocol import Page
from eval.report.context import Report
from eval.report.read import Run, read_run, repeated
from eval.report.sections import SECTIONS
from eval.results import open_results, write_text

log = logging.getLogger(__name__)

_NAME_LENGTH = 40  # characters of the runs' names in a file name


@dataclass
class ReportEvaluation(EvalConfig):
    """Settings of the ``report``.

    Attributes:
        compare: Further checkpoints, which are compared with the first on one page.
    """

    compare: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compare = [check_path("compare", path) for path in self.compare]


def write_report(config: ReportEvaluation) -> dict[str, Any]:
    """Write a self-contained page; return its file, its runs and what is missing in it.

    Without ``compare`` it is ``report.html`` in the run directory; with ``compare`` it compares all runs and
    is written beside the first run's directory (see ``comparison_name``). ``out`` names another folder.

    Raises:
        UserError: a path holds no run, there are more runs than colours, a file was not written by training
            or evaluation, or the page cannot be written.
    """
    runs = _compared([config.checkpoint, *config.compare]) if config.compare else [_only(config.checkpoint)]
    beside, name = runs[0].folder, "report.html"
    if config.compare:
        beside, name = beside.absolute().parent, comparison_name(runs)
    target = (Path(config.out) if config.out else beside) / name
    open_results(target.parent)
    log.info("drawing the report of %s", ", ".join(run.name for run in runs))
    report = Report(config, runs)
    text = build(report)
    write_text(target, text)
    for reason in [*report.missing, *repeated(runs)]:
        log.warning("report: %s", reason)
    log.info("report: %s", target)
    more = {"runs": [run.name for run in runs]} if config.compare else {"missing": report.missing}
    return {"protocol": "report", "file": str(target), "bytes": len(text.encode()), **more}


PROTOCOL = Page(ReportEvaluation, write_report)


def comparison_name(runs: list[Run]) -> str:
    """Return the file name of a comparison, which depends only on the runs."""
    names = "-".join(run.folder.absolute().name for run in runs)[:_NAME_LENGTH]
    folders = "\0".join(str(run.folder.resolve()) for run in runs)
    return f"comparison-{names}-{hashlib.sha256(os.fsencode(folders)).hexdigest()[:8]}.html"


def build(report: Report) -> str:
    """Return the HTML document; contents that could not be drawn are listed below the header."""
    header, *others = (section(report) for section in SECTIONS)
    lacking = warning("Not on this page:", report.missing) if report.missing else ""
    names = [run.name for run in report.runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return page(f"{title} · contrastive pretraining", [header, lacking, *others])


def _only(path: str) -> Run:
    # A run that stopped before its first checkpoint has no encoder, but curves.
    run = Path(path) if (Path(path) / "config.yaml").is_file() else resolve(path).run
    if run is None:
        raise UserError(
            f"checkpoint={path}: is not inside a run directory (no config.yaml there), so there "
            "is nothing to report; give runs/NAME"
        )
    return read_run(run, run.name)


def _compared(paths: list[str]) -> list[Run]:
    if len(paths) > SERIES:
        raise UserError(f"report: {len(paths)} runs given, up to {SERIES} can be told apart; compare fewer")
    folders = [_folder(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        log.warning("report: a run is given twice, and compared with itself")
    names = [folder.absolute().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else path)
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

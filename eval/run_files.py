"""Read files of a run directory: JSON, tables, and from them how long the run trained."""

import csv
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from contrastive.config import ScheduleConfig, UserError


def describe_epochs(folder: Path, schedule: ScheduleConfig) -> str:
    """Describe the length of a run: its epochs, or those that its summary says it has done.

    These are fewer with ``trainer.max_steps``, and unknown before with a time budget.
    A run without a summary was stopped, or still goes on: what it has done is named, where that is known.
    """
    summary = read_json(folder / "summary.json")
    budget = None if schedule.minutes is None else f"{schedule.minutes:g} min"
    planned = budget or f"{schedule.epochs} epoch{'s' * (schedule.epochs != 1)}"
    done = summary.get("epochs") if summary else epochs_done(folder)
    if not isinstance(done, int | float):
        return planned
    if not summary:
        return f"{done:.1f} {'epochs of' if budget else 'of'} {planned}, not finished"
    if budget:
        return f"{done:.1f} epochs in {budget}"
    return planned if done >= schedule.epochs else f"{done:.1f} of {planned}"


def epochs_done(folder: Path) -> float | None:
    """Return the epochs at the newest checkpoint, by the length of one in metrics.csv; None if not known."""
    rows = [
        (read_number(row.get("step")), read_number(row.get("epoch")))
        for row in read_csv(folder / "metrics.csv")
    ]
    step, epoch = max(((step, epoch) for step, epoch in rows if step > 0 and epoch > 0), default=(0.0, 0.0))
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return max([epoch, *(int(name) * epoch / step for name in names if name.isdigit())]) if step else None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no file.

    Raises:
        UserError: not JSON, not an object, or a number in it is not finite.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is not JSON ({error}); delete it, and evaluate again if it lies in eval/"
        ) from error
    if not isinstance(content, dict):
        refuse(path, "it holds no object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text} is not a finite number")
    return number


def refuse(path: Path, error: Exception | str) -> NoReturn:
    """Raise UserError for a file that holds something else than training or evaluation writes."""
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    raise UserError(
        f"{path}: not what contrastive-eval writes ({reason}); delete it and evaluate again"
    ) from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read rows by column; none if there is no file. Bytes that are not UTF-8 become question marks.

    Raises:
        UserError: the file is not a csv table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise UserError(f"{path}: not a table ({error}); move it away") from error


def read_number(text: str | None) -> float:
    """Return the number in a cell; NaN if there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan

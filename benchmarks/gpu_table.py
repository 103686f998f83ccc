"""Measure what is missing in the table of a GPU, most valuable first, in slices; the same command continues.

    python benchmarks/gpu_table.py [--slice 540] [--data DIR]
    python benchmarks/gpu_table.py --list | --wheels
    python benchmarks/gpu_table.py --device cpu --tiny --out DIR    (checks that every command starts)

Each finished line is a JSON file in ``benchmarks/results/gpu``; delete one to measure it again, also one
that failed. ``README.md`` there is the table of all, and the main README's copy of it is replaced. This
command has ended after ``--slice`` seconds: a training run saves, and continues in the next slice; a line
that cannot be continued is started only if it is likely to end. What is in progress is kept in ``.data/gpu``,
with the output of each command in ``log``. Exit codes: 0 all is measured, 75 something is missing.

DIR holds CIFAR-10 as image files, ``train/CLASS`` and ``test/CLASS``; all other lines make random images.
Nothing needs a network; ``--wheels`` lists the packages to carry to a machine without one.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_wheels
import torch
from common import RESULTS, context, write
from gpu_rows import ROOT, Figures, Result, Row, all_rows

SAVE_S = 30.0
"""Seconds at the end of a slice: a run saves after SIGTERM; what has not ended after two thirds is killed."""

WORTH_S = 90.0
"""Seconds that a run must have to take more steps than its start costs."""

MISSING = 75
START, END = "<!-- gpu-table -->", "<!-- end of gpu-table -->"


class Stopped(Exception):
    """The slice is over, or the command was asked to stop."""


class Failed(Exception):
    """A command ended with an exit code that says so."""


@dataclass(frozen=True)
class Table:
    """Where lines are measured and kept.

    Attributes:
        out: Folder of the finished lines and of README.md.
        work: Folder of what is in progress.
        describe: Returns the context of a line: device, commit, versions.
        execute: Runs a command in a folder until a time of ``clock``, see ``execute``.
        clock: Returns seconds that only grow.
    """

    out: Path
    work: Path
    describe: Callable[[], dict[str, Any]]
    execute: Callable[[Sequence[str], Path, float], Result]
    clock: Callable[[], float] = time.monotonic

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if not (self.out / f"{row.name}.json").is_file()]

    def least(self, row: Row) -> float:
        """Return the seconds that must be left to start a line; more than it was stopped after, if it was."""
        note = self.work / row.name / "stopped_after"
        if row.resumes:
            return min(WORTH_S, row.seconds)
        return max(row.seconds, float(note.read_text()) + 1 if note.is_file() else 0.0)

    def fill(self, rows: Sequence[Row], seconds: float) -> list[Row]:
        """Measure missing lines until the slice is over; return those that are still missing."""
        end = self.clock() + seconds - SAVE_S
        for row in self.missing(rows):
            least, left = self.least(row), end - self.clock()
            if least > left:
                where = "the next slice" if least < seconds - SAVE_S else f"--slice {least + SAVE_S + 1:.0f}"
                say(f"{row.name}: {left:.0f} s are left, {least:.0f} s are needed; left to {where}")
                continue
            say(f"{row.name}: about {row.seconds:.0f} s")
            try:
                made = self.measure(row, end)
            except Stopped:
                say(f"{row.name}: stopped; to be continued")
                (self.work / row.name / "stopped_after").write_text(f"{left}")
                continue
            write(self.out / f"{row.name}.json", self.describe() | made)
            (self.out / "README.md").write_text(page(self.lines(rows)))
        return self.missing(rows)

    def measure(self, row: Row, end: float) -> dict[str, Any]:
        """Run a line's commands; return what they found, or that one failed.

        Raises:
            Stopped: it is to be continued in another slice.
        """
        work, started = self.work / row.name, self.clock()
        if not row.resumes:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        about = {"row": row.name, "commands": [" ".join(command) for command in row.commands]}
        try:
            results = [self.execute(command, work, end) for command in row.commands]
            figures = row.read(results)
        except Failed as error:
            say(f"{row.name}: failed, {error}")
            return about | {"failed": str(error)}
        if figures is None:
            raise Stopped
        peaks = [result["peak_memory_mib"] for result in results if "peak_memory_mib" in result]
        peak = {"peak_memory_mib": max(peaks)} if peaks else {}
        seconds = round(self.clock() - started, 1)
        return about | {"figures": figures, **peak, "last_start_s": seconds, "results": results}

    def lines(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the finished lines in the order of ``rows``, then those that are no longer among them."""
        found = {path.stem: json.loads(path.read_text()) for path in sorted(self.out.glob("*.json"))}
        names = [row.name for row in rows if row.name in found]
        return [found[name] for name in [*names, *(name for name in found if name not in names)]]


def execute(command: Sequence[str], work: Path, end: float) -> Result:
    """Run a command of a line until ``end`` (of the monotonic clock); return its result.

    Raises:
        Stopped: it was stopped, here or by another.
        Failed: it ended with another exit code than 0.
    """
    left = f"{end - time.monotonic():.0f}"
    given = [part.replace("{work}", str(work)).replace("{left}", left) for part in command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = work / "log"
    with log.open("a") as errors, (work / "stdout").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *given],
            cwd=ROOT,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(None if math.isinf(end) else max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Stopped from None
        finally:
            stop(process)
        output.seek(0)
        printed = output.read()
    if code == MISSING:
        raise Stopped
    if code:
        raise Failed(
            f"exit code {code}: {(log.read_text().strip().splitlines() or ['no message'])[-1][:300]}"
        )
    files = sorted(work.glob("*.json"))
    last = files[0].read_text() if files else printed.strip().rpartition("\n")[2]
    found: Result = json.loads(last or "{}")
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a command to save and end; kill it, and what it started, if it does not."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SAVE_S * 2 / 3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table, and below it what it was measured on."""
    made_by = sorted(
        {f"{one['device']}, torch {one['versions']['torch']}, commit `{one['commit'][:7]}`" for one in lines}
    )
    rows = [f"| {one['row']} | {shown(one)} | {number(one.get('peak_memory_mib', '-'))} |" for one in lines]
    return "\n".join(
        ["| | measured | peak MiB |", "|---|---|---|", *rows, "", *(f"{one}." for one in made_by), ""]
    )


def shown(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"**failed**, {line['failed'].replace('|', '/')}"
    figures: Figures = line["figures"]
    return "; ".join(f"{name} {number(value)}" for name, value in figures.items())


def number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def copy_between_markers(document: Path, table: str) -> None:
    """Replace what stands between the two marker comments of a document."""
    head, start, rest = document.read_text().partition(START)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{document}: needs {START} and, below it, {END}")
    document.write_text(f"{head}{start}\n{table}{end}{tail}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice", type=float, default=math.inf, help="seconds until this command has ended")
    parser.add_argument(
        "--data", type=Path, help="holds train/CLASS and test/CLASS (CIFAR-10), maybe outfits"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes; needs --out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="lines to measure; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    parser.add_argument("--work", type=Path, default=ROOT / ".data" / "gpu")
    parser.add_argument("--list", action="store_true", help="list the lines, and whether they are measured")
    parser.add_argument("--wheels", action="store_true", help="list the packages to carry")
    asked = parser.parse_args()
    if asked.wheels:
        print(gpu_wheels.listing())
        return 0
    published = asked.out == RESULTS / "gpu"
    if published and not asked.list and (asked.device == "cpu" or asked.tiny):
        parser.error("--device cpu and --tiny are no results of a GPU; give --out another folder")
    if asked.device == "cuda" and not asked.list and not torch.cuda.is_available():
        parser.error("torch sees no GPU; to check the commands, give --device cpu --tiny --out DIR")
    rows = all_rows(asked.device, asked.data, asked.tiny)
    if unknown := set(asked.only or ()) - {row.name for row in rows}:
        parser.error(f"--only {' '.join(sorted(unknown))}: allowed are {', '.join(row.name for row in rows)}")
    device = torch.device(asked.device)
    packages = ("torch", "torchvision", "pytorch-lightning", "kornia", "faiss-cpu")
    table = Table(
        asked.out.absolute(), asked.work.absolute(), lambda: context("gpu", device, packages), execute
    )
    chosen = [row for row in rows if not asked.only or row.name in asked.only]
    if asked.list:
        missing = table.missing(chosen)
        print("\n".join(f"{'missing' if row in missing else 'done':8} {row.name}" for row in chosen))
        return 0
    if asked.data is None:
        say("without --data, lines that score on CIFAR-10 are left out unless torchvision's copy is in .data")
    missing = table.fill(chosen, asked.slice)
    if published and (lines := table.lines(rows)):
        copy_between_markers(ROOT / "README.md", page(lines))
    if missing:
        say(f"missing: {', '.join(row.name for row in missing)}; run the same command again")
    return MISSING if missing else 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(MISSING)
    )  # so that a command in progress is stopped too
    sys.exit(main())

"""Measure whether mining helps: the same short pretraining with other negatives, arm by arm, seed by seed.

    python benchmarks/ablate.py --preset regimes --data DIR [--jobs 2] [--slice SECONDS]
    python benchmarks/ablate.py --preset instances,classes --data DIR --report
    python benchmarks/ablate.py --preset gpu --data DIR --slice 540

DIR holds ``train/CLASS`` and ``test/CLASS`` (CIFAR-10 as image files), and ``outfits`` with ``frames`` and
``identities``. Presets and arms are in ``ablate_presets.py``; ``regimes`` and ``regimes-gpu``
stand for all regimes. A cell is one training run and its scores: one line of
``benchmarks/results/ablate-PRESET.jsonl``, so the same command continues where it was stopped. ``--slice``
starts no cell that, by the longest so far, would not end within that many seconds. The most telling cells
come first: of every preset in turn the temperatures and then one seed after the other of all arms; then the
confirmations; then other numbers of negatives and rules. Each call writes what the cells so far say to
``ablate-PRESET.json``, ``.md`` and ``.png``; ``--report`` runs nothing.

The comparison is fair: all arms see the same images in the same order through the same views and start from
the same weights (all are functions of the seed). Each arm gets the same few temperatures, chosen on images
that are not reported on, with tuning seeds that are not reported (at K = 64, and kept for other K).
Differences are paired over seeds, with Holm's correction over arms; the best arm (oracles aside) is trained
again, beside ``all_rows`` and ``uniform``, on seeds that were not used for any choice.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import ablate_report
from ablate_cell import Cell, prepare_worker, run
from ablate_data import count_images, prepare
from ablate_presets import CORE, METHODS, MINERS, ORACLES, PRESETS, REGIMES
from ablate_report import REFERENCES, TITLES
from common import RESULTS, write

STAGES = ("seeds", "fresh", "variants")
"""Parts of the work: the arms at one K; the confirmation; other K and rules, the arms ``NAME@...``."""

LEAST_SEEDS = 2
"""Seeds from which an arm is reported."""


class Ablation:
    """Cells to run, and results of the finished ones.

    Args:
        name: Name of the preset.
        chosen: Arms, in the order in which they are run; None: all.
        folder: Where the preset keeps its links and runs.
        cells: File of the finished cells, one JSON object a line.
    """

    def __init__(self, name: str, chosen: Sequence[str] | None, folder: Path, cells: Path) -> None:
        self.name, self.preset, self.folder, self._cells = name, PRESETS[name], folder, cells
        self.rows = count_images(folder / "data")
        self.arms = self.preset.arms(self.rows)
        self.chosen = tuple(self.arms if chosen is None else chosen)
        self.titles = TITLES[self.preset.scores]
        lines = cells.read_text().splitlines() if cells.is_file() else []
        self._kept: dict[str, dict[str, Any]] = {one["cell"]: one for one in map(json.loads, lines)}

    def cell(self, arm: str, temperature: float, seed: int, part: str) -> Cell:
        preset = self.preset
        epochs = preset.epochs if part == "test" else round(preset.tuning_share * preset.epochs)
        size = (f"data.global_batch={preset.batch}", f"schedule.epochs={epochs}")
        first = arm == self.chosen[0] and seed == preset.seeds[0] and part == "test"
        return Cell(
            arm,
            temperature,
            seed,
            part,
            preset.recipe,
            (*preset.settings, *size, *self.arms[arm]),
            preset.data,
            preset.scores,
            preset.device,
            miner=MINERS.get(arm, ""),
            baselines=first,
            method=METHODS.get(arm, ""),
        )

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a finished cell."""
        return self._kept.get(cell.name)

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        self._kept[cell.name] = result
        self._cells.parent.mkdir(parents=True, exist_ok=True)
        with self._cells.open("a") as file:
            file.write(json.dumps({"cell": cell.name, **result}) + "\n")

    def tuning(self, arm: str) -> dict[float, list[Cell]]:
        preset = self.preset
        return {
            temperature: [self.cell(arm, temperature, seed, "validation") for seed in preset.tuning_seeds]
            for temperature in preset.temperatures
        }

    def tuned(self, arm: str) -> dict[float, float] | None:
        """Return the mean score at each temperature, -1 if it diverged; None until all cells are finished.

        An arm ``NAME@...`` has the temperature of NAME.
        """
        means, chosen_by = {}, next(iter(self.titles))
        for temperature, cells in self.tuning(arm.partition("@")[0]).items():
            results = [self.found(cell) for cell in cells]
            if None in results:
                return None
            scores = [
                result["scores"][chosen_by] if result["scores"] else -1.0 for result in results if result
            ]
            means[temperature] = statistics.mean(scores)
        return means

    def cells(self, arm: str, seeds: Sequence[int]) -> list[Cell]:
        """Return the reported cells of an arm; none before its temperature is chosen."""
        means = self.tuned(arm)
        if means is None:
            return []
        best = max(means, key=lambda temperature: means[temperature])
        return [self.cell(arm, best, seed, "test") for seed in seeds]

    def results(self, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Return the results of the finished cells of an arm over ``seeds``."""
        found = [self.found(cell) for cell in self.cells(arm, seeds)]
        return [result for result in found if result is not None]

    def complete(self, arm: str, seeds: Sequence[int]) -> bool:
        return len(self.results(arm, seeds)) == len(seeds)

    def reported(self, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """Return the results of the arms that have enough seeds and did not diverge on any."""
        found = {arm: self.results(arm, seeds) for arm in arms}
        return {
            arm: results
            for arm, results in found.items()
            if len(results) >= LEAST_SEEDS and all(result["scores"] for result in results)
        }

    def plain_arms(self) -> list[str]:
        return [arm for arm in self.chosen if "@" not in arm]

    def winner(self) -> str | None:
        """Return the arm to confirm, once every arm has run: the best one that does not use labels."""
        arms, seeds, chosen_by = self.plain_arms(), self.preset.seeds, next(iter(self.titles))
        if not all(self.complete(arm, seeds) for arm in arms):
            return None
        means = {
            arm: statistics.mean(run["scores"][chosen_by] for run in runs)
            for arm, runs in self.reported(arms, seeds).items()
            if arm not in ORACLES
        }
        return max(means, key=lambda arm: means[arm]) if means else None

    def confirming(self) -> list[str]:
        best = self.winner()
        return [] if best is None else list(dict.fromkeys((best, *REFERENCES)))

    def missing(self, stage: str) -> Iterator[Cell]:
        """Return the known cells of ``stage`` that are not finished, in the order in which to run them."""
        return (cell for cell in self._wanted(stage) if self.found(cell) is None)

    def _wanted(self, stage: str) -> Iterator[Cell]:
        first, preset = self.plain_arms(), self.preset
        if stage == "seeds":
            for arm in first:
                yield from (cell for cells in self.tuning(arm).values() for cell in cells)
            yield from self._seed_by_seed(first, preset.seeds)
        elif stage == "fresh":
            yield from self._seed_by_seed(self.confirming(), preset.fresh_seeds)
        else:
            yield from self._seed_by_seed([arm for arm in self.chosen if arm not in first], preset.seeds)

    def _seed_by_seed(self, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
        for seed in seeds:
            for arm in arms:
                yield from self.cells(arm, [seed])

    def progress(self) -> str:
        """Return a table of the finished cells of each arm."""
        lines = [f"{self.name:<22}{'tuned':>8}{'seeds':>8}{'fresh':>8}"]
        for arm in self.chosen:
            tuning = [] if "@" in arm else [cell for cells in self.tuning(arm).values() for cell in cells]
            fresh = self.cells(arm, self.preset.fresh_seeds) if arm in self.confirming() else []
            parts = (tuning, self.cells(arm, self.preset.seeds), fresh)
            counts = [f"{sum(self.found(c) is not None for c in cells)}/{len(cells)}" for cells in parts]
            lines.append(f"{arm:<22}" + "".join(f"{count:>8}" for count in counts))
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """Return everything measured on the arms that are reported."""
        preset = self.preset
        reported = self.reported(self.chosen, preset.seeds)
        ended = [arm for arm in self.chosen if self.complete(arm, preset.seeds)]
        steps = self.rows // preset.batch * preset.epochs
        made_by = [run["made_by"] for runs in reported.values() for run in runs]
        return {
            "benchmark": f"ablate-{self.name}",
            "made_by": [one for place, one in enumerate(made_by) if one not in made_by[:place]],
            "preset": self.name,
            "description": preset.description,
            "settings": [preset.recipe, *preset.settings],
            "titles": self.titles,
            "budgets": preset.budgets,
            "rows": self.rows,
            "steps": steps,
            "samples": steps * preset.batch,
            "temperatures": preset.temperatures,
            "tuning_seeds": preset.tuning_seeds,
            "tuning_share": preset.tuning_share,
            "seeds": preset.seeds,
            "fresh_seeds": preset.fresh_seeds,
            "open": [arm for arm in self.arms if arm not in ended],
            "diverged": [arm for arm in ended if arm not in reported],
            "arms": {arm: self._arm(arm, runs) for arm, runs in reported.items()},
            "baselines": next(
                (run["baselines"] for runs in reported.values() for run in runs if "baselines" in run), {}
            ),
            "differences": ablate_report.compare(reported, self.titles),
            "confirmation": self._confirmation(),
            "missing": sum(1 for stage in STAGES for _ in self.missing(stage)),
        }

    def _arm(self, arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "overrides": self.arms[arm],
            **ablate_report.summarise(runs, self.titles),
            "validation": {
                f"{temperature:g}": score for temperature, score in (self.tuned(arm) or {}).items()
            },
        }

    def _confirmation(self) -> dict[str, Any] | None:
        wanted, seeds = self.confirming(), self.preset.fresh_seeds
        reported = self.reported(wanted, seeds)
        if not wanted or len(reported) < len(wanted) or not all(self.complete(arm, seeds) for arm in wanted):
            return None
        return {
            "winner": self.winner(),
            "arms": {arm: ablate_report.summarise(runs, self.titles) for arm, runs in reported.items()},
            "differences": ablate_report.compare(reported, self.titles),
        }


def missing(ablations: Sequence[Ablation]) -> Iterator[tuple[Ablation, Cell]]:
    """Return the cells to run now, the most telling first."""
    for stage in STAGES:
        for ablation in ablations:
            yield from ((ablation, cell) for cell in ablation.missing(stage))


def work(ablations: Sequence[Ablation], jobs: int, seconds: float) -> None:
    """Run what is missing, ``jobs`` cells at a time, until all is done or the slice is over."""
    started, longest = time.monotonic(), 0.0
    running: dict[Future[dict[str, Any]], tuple[Ablation, Cell, float]] = {}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which import torch after this
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, prepare_worker, (os.getpid(),)) as pool:
        while True:
            busy = {(ablation.name, cell.name) for ablation, cell, _ in running.values()}
            free = [(its, cell) for its, cell in missing(ablations) if (its.name, cell.name) not in busy]
            if time.monotonic() - started + 1.2 * longest > seconds:  # arms differ, and so may the next cell
                free = []
            for ablation, cell in free[: jobs - len(running)]:
                running[pool.submit(run, cell, ablation.folder)] = (ablation, cell, time.monotonic())
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ablation, cell, since = running.pop(future)
                ablation.keep(cell, future.result())
                longest = max(longest, time.monotonic() - since)
                tell(ablation, cell, future.result(), time.monotonic() - started)


def tell(ablation: Ablation, cell: Cell, result: dict[str, Any], elapsed: float) -> None:
    scores = result["scores"]
    titles = ablation.titles
    shown = "diverged" if scores is None else ", ".join(f"{name} {100 * scores[name]:.1f}" for name in titles)
    seconds = f"training {result['train_s']:.0f} s ({result['train_cpu_s']:.0f} s of processor)"
    what = f"{ablation.name}: {cell.arm} t={cell.temperature:g} seed={cell.seed} {cell.part}"
    print(f"[{elapsed:.0f} s] {what}: {shown}; {seconds}", file=sys.stderr, flush=True)


def report(ablation: Ablation, folder: Path, *, with_plot: bool) -> None:
    """Write JSON, table and plot of the reported arms; nothing until the reference arm is among them."""
    document = ablation.document()
    if REFERENCES[0] not in document["arms"]:
        message = f"{ablation.name}: nothing to report until {REFERENCES[0]} has {LEAST_SEEDS} seeds"
        print(message, file=sys.stderr)
        return
    path = folder / f"ablate-{ablation.name}.json"
    write(path, document)
    path.with_suffix(".md").write_text(ablate_report.markdown(document))
    if with_plot:
        ablate_report.plot(document, path.with_suffix(".png"))


def choose_presets(text: str) -> list[str]:
    """Parse names of presets; ``regimes`` and ``regimes-gpu`` are all of them."""
    groups = {"regimes": REGIMES, "regimes-gpu": [f"{name}-gpu" for name in REGIMES]}
    chosen = [name for given in text.split(",") for name in groups.get(given, [given])]
    if unknown := set(chosen) - set(PRESETS):
        allowed = ", ".join([*groups, *PRESETS])
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: allowed are {allowed}")
    return chosen


def choose_arms(text: str, preset: str) -> list[str] | None:
    """Parse ``all``, ``core``, or names of arms; the references come first."""
    known = PRESETS[preset].arms(1000)
    if text == "all":
        return None
    chosen = [*CORE] if text == "core" else text.split(",")
    if unknown := set(chosen) - set(known):
        wrong = ", ".join(sorted(unknown))
        raise SystemExit(f"--arms {wrong}: allowed are all, {', '.join(known)}, and core for cpu and gpu")
    return [*REFERENCES, *(arm for arm in chosen if arm not in REFERENCES)]


def open_ablation(name: str, asked: argparse.Namespace) -> Ablation:
    """Lay out the images of a preset, and read its finished cells."""
    folder, data = (asked.cache / name).absolute(), PRESETS[name].data
    prepare(data, asked.data / data.source, folder / "data")
    return Ablation(name, choose_arms(asked.arms, name), folder, asked.cells / f"ablate-{name}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", type=choose_presets, required=True, help="names separated by commas")
    parser.add_argument("--data", type=Path, required=True, help="holds train/CLASS, test/CLASS, and outfits")
    parser.add_argument("--arms", default="all", help="all, core, or names separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, one thread each on the CPU")
    parser.add_argument(
        "--slice", type=float, default=float("inf"), help="seconds after which no cell starts"
    )
    parser.add_argument("--cache", type=Path, default=Path(".data/ablate"), help="folder of links and runs")
    parser.add_argument("--cells", type=Path, default=RESULTS, help="folder of the finished cells")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing, report the finished cells")
    parser.add_argument("--no-plot", action="store_true")
    asked = parser.parse_args()
    ablations = [open_ablation(name, asked) for name in asked.preset]
    if not asked.report:
        work(ablations, asked.jobs, asked.slice)
    for ablation in ablations:
        print(ablation.progress(), file=sys.stderr)
        report(ablation, asked.out, with_plot=not asked.no_plot)


if __name__ == "__main__":
    main()

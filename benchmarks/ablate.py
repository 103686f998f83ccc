"""Measure whether mining helps: the same short pretraining with other negatives, arm by arm, seed by seed.

    python benchmarks/ablate.py --preset cpu --data DIR [--jobs 2] [--arms core] [--slice SECONDS]
    python benchmarks/ablate.py --preset gpu --data DIR --slice 540

DIR holds ``train/CLASS`` and ``test/CLASS`` (CIFAR-10 as image files). A cell is one training run and its
scores; finished ones are kept under ``.data/ablate/PRESET/cells``, so the same command continues where it was
stopped. ``--slice`` starts no cell that, by the longest so far, would not end within that many seconds.
Each call writes the results of the complete arms to ``benchmarks/results/ablate-PRESET.json``, ``.md`` and
``.png`` and prints to stderr which are missing; ``--report`` runs nothing.

The comparison is fair: all arms see the same images in the same order through the same views and start from
the same weights (all are functions of the seed). Each arm gets the same few temperatures, chosen by the
linear probe, fitted and scored on training images alone, with tuning seeds that are not reported.
Differences are paired over seeds, with Holm's correction over arms; the best arm (by the linear probe,
oracles aside) is trained again, beside ``all_rows`` and ``uniform``, on seeds that were not used for any
choice.

``cpu`` checks the instrument and shows tendencies: about 45 s of one core a cell. ``gpu`` (ResNet-18, all of
CIFAR-10, bf16) is for the defaults: cells of a few minutes; it has not been run yet.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablate_report
from ablate_cell import Cell, link_parts, prepare_worker, run
from ablate_report import REFERENCES, TITLES
from common import RESULTS, write

CORE = ("all_rows", "uniform", "band", "hardest", "band_oracle", "dcl", "hcl", "full_bank")
ORACLES = ("band_oracle", "supcon")
"""Arms that use labels: they show what is possible, and are never candidates."""

CHOSEN_BY = "linear"


@dataclass(frozen=True)
class Preset:
    """A size of the ablation.

    Attributes:
        description: Text in the report.
        recipe: Shipped recipe that every arm starts from.
        settings: Overrides of the recipe, the same for all arms.
        device: ``cpu`` or ``cuda``.
        per_class: Images a class to train on; None takes all.
        validation_per_class: Training images a class to choose temperatures by.
        epochs: Epochs of each cell.
        batch: Images of a step.
        temperatures: Temperatures that each arm tries.
        tuning_seeds: Seeds for the choice of a temperature.
        seeds: Seeds that are reported.
        fresh_seeds: Seeds for the confirmation.
    """

    description: str
    recipe: str
    settings: tuple[str, ...]
    device: str
    per_class: int | None
    validation_per_class: int
    epochs: int
    batch: int
    temperatures: tuple[float, ...]
    tuning_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fresh_seeds: tuple[int, ...] = (200, 201, 202, 203, 204)


PRESETS = {
    "cpu": Preset(
        "CIFAR-10 as JPEG files, 500 training images a class, ResNet-10 of width 16 at 24 px, bf16.",
        "cifar10",
        (
            "data.image_size=24",
            "augment=cifar",
            "encoder.name=resnet10",
            "encoder.width=16",
            "encoder.projector_hidden=256",
            "encoder.projector_dim=128",
            "encoder.momentum_end=null",
            "objective.symmetric=false",
            "optimizer.base_lr=0.1",
            "schedule.warmup_epochs=1",
            "trainer.precision=bf16-mixed",
            "data.num_workers=0",
        ),
        "cpu",
        per_class=500,
        validation_per_class=500,
        epochs=8,
        batch=128,
        temperatures=(0.1, 0.2),
    ),
    "gpu": Preset(
        "CIFAR-10, all 50,000 training images, ResNet-18 at 32 px, bf16, the recipe cifar10_fast cut short.",
        "cifar10_fast",
        ("schedule.warmup_epochs=2",),
        "cuda",
        per_class=None,
        validation_per_class=1000,
        epochs=25,
        batch=512,
        temperatures=(0.1, 0.2),
    ),
}


def arms(rows: int, batch: int, epochs: int) -> dict[str, tuple[str, ...]]:
    """Return each arm's overrides for a data set of ``rows``; the core arms come first.

    Bands, hcl and debiased use the prior that a tenth of the images is of one class. ``hcl``: beta acts on
    logits; 0.5 is about the tilt that the paper's 1 is at its temperature of 0.5. ``batch``, ``sogclr`` and
    ``neighbours`` take both views as queries, so that a step costs more; they mine nothing.
    """
    an_epoch = rows // batch
    every = ("bank.max_age=null", "mining=all_rows")
    near = ("bank.max_age=null", "mining.class_prior=0.1", "mining.num_hard=256", "mining.num_uniform=256")
    return {
        "all_rows": every,
        # No hard negatives, so no band to look up: the default band would be searched in vain.
        "uniform": (
            "bank.max_age=null",
            "mining=uniform",
            "mining.num_uniform=512",
            "mining.band=[0,0.000001]",
        ),
        "band": ("mining=band", *near),
        "hardest": ("bank.max_age=null", "mining=hardest", "mining.num_hard=256"),
        "band_oracle": ("mining=band", *near, "mining.skip_top=0"),
        "dcl": (*every, "objective.name=dcl"),
        "hcl": (*every, "objective.name=hcl", "objective.tau_plus=0.1", "objective.beta=0.5"),
        "full_bank": (
            "bank.max_age=null",
            "mining=full_bank",
            "mining.num_hard=256",
            "mining.num_uniform=1024",
        ),
        "mix": ("bank.max_age=null", "mining=mix"),
        "batch": (*every, "method=simclr"),
        "sogclr": (*every, "method=sogclr"),
        "neighbours": (*every, "method=simclr", "data.order=neighbours", "mining.class_prior=0.1"),
        "queue": (*every, "bank.kind=queue", f"bank.capacity={rows // 2}"),
        "ring": ("mining=ring", *near, f"mining.band_steps={an_epoch * epochs * 2 // 3}"),
        "debiased": (*every, "objective.name=debiased", "objective.tau_plus=0.1"),
        "mixing": (*every, "objective.name=mixing"),
        "nnclr": (*every, "objective.name=nnclr"),
        "supcon": (*every, "objective.name=supcon"),
        "max_age_half_epoch": (*every, f"bank.max_age={an_epoch // 2}"),
        "max_age_eighth_epoch": (*every, f"bank.max_age={an_epoch // 8}"),
    }


class Ablation:
    """Cells to run, and results of the finished ones.

    Args:
        name: Name of the preset.
        chosen: Arms, in the order in which they are run.
        folder: Where the preset keeps its cells, links and runs.
    """

    def __init__(self, name: str, chosen: Sequence[str], folder: Path) -> None:
        self.name, self.preset, self.chosen, self.folder = name, PRESETS[name], tuple(chosen), folder
        train = folder / "data" / "test" / "train"
        self.rows = sum(len(list(place.iterdir())) for place in train.iterdir())
        self.arms = arms(self.rows, self.preset.batch, self.preset.epochs)
        self._kept: dict[str, dict[str, Any]] = {}

    def cell(self, arm: str, temperature: float, seed: int, part: str) -> Cell:
        preset = self.preset
        size = (f"data.global_batch={preset.batch}", f"schedule.epochs={preset.epochs}")
        first = arm == self.chosen[0] and seed == preset.seeds[0] and part == "test"
        return Cell(
            arm,
            temperature,
            seed,
            part,
            preset.recipe,
            (*preset.settings, *size, *self.arms[arm]),
            (preset.per_class, preset.validation_per_class),
            preset.device,
            oracle=arm == "band_oracle",
            baselines=first,
        )

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a finished cell."""
        if cell.name not in self._kept:
            path = self.folder / "cells" / f"{cell.name}.json"
            if not path.is_file():
                return None
            self._kept[cell.name] = json.loads(path.read_text())
        return self._kept[cell.name]

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        path = self.folder / "cells" / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".part")
        staged.write_text(json.dumps(result, indent=1) + "\n")
        staged.replace(path)

    def tuning(self, arm: str) -> dict[float, list[Cell]]:
        preset = self.preset
        return {
            temperature: [self.cell(arm, temperature, seed, "validation") for seed in preset.tuning_seeds]
            for temperature in preset.temperatures
        }

    def tuned(self, arm: str) -> dict[float, float] | None:
        """Return the mean score at each temperature, -1 if it diverged; None until all cells are finished."""
        means = {}
        for temperature, cells in self.tuning(arm).items():
            results = [self.found(cell) for cell in cells]
            if None in results:
                return None
            scores = [
                result["scores"][CHOSEN_BY] if result["scores"] else -1.0 for result in results if result
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

    def results(self, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]] | None:
        """Return the results of an arm over ``seeds``; None until all cells are finished."""
        found = [self.found(cell) for cell in self.cells(arm, seeds)]
        there = [result for result in found if result is not None]
        return there if len(there) == len(seeds) else None

    def complete(self, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """Return the results of the arms that have all ``seeds`` and did not diverge on any."""
        found = {arm: self.results(arm, seeds) for arm in arms}
        return {
            arm: results
            for arm, results in found.items()
            if results is not None and all(result["scores"] for result in results)
        }

    def winner(self) -> str | None:
        """Return the arm to confirm, once every arm has run: the best one that does not use labels."""
        if any(self.results(arm, self.preset.seeds) is None for arm in self.chosen):
            return None
        means = {
            arm: statistics.mean(run["scores"][CHOSEN_BY] for run in runs)
            for arm, runs in self.complete(self.chosen, self.preset.seeds).items()
            if arm not in ORACLES
        }
        return max(means, key=lambda arm: means[arm]) if means else None

    def confirming(self) -> list[str]:
        best = self.winner()
        return [] if best is None else list(dict.fromkeys((best, *REFERENCES)))

    def missing(self) -> Iterator[Cell]:
        """Return the cells that are known now and not finished, in the order in which to run them."""
        for arm in self.chosen:
            wanted = [cell for cells in self.tuning(arm).values() for cell in cells]
            wanted += self.cells(arm, self.preset.seeds)
            yield from (cell for cell in wanted if self.found(cell) is None)
        for arm in self.confirming():
            yield from (cell for cell in self.cells(arm, self.preset.fresh_seeds) if self.found(cell) is None)

    def progress(self) -> str:
        """Return a table of the finished cells of each arm."""
        lines = [f"{'arm':<22}{'tuned':>8}{'seeds':>8}{'fresh':>8}"]
        for arm in self.chosen:
            tuning = [cell for cells in self.tuning(arm).values() for cell in cells]
            fresh = self.cells(arm, self.preset.fresh_seeds) if arm in self.confirming() else []
            parts = [
                (tuning, len(tuning)),
                (self.cells(arm, self.preset.seeds), len(self.preset.seeds)),
                (fresh, len(fresh)),
            ]
            counts = [f"{sum(self.found(c) is not None for c in cells)}/{total}" for cells, total in parts]
            lines.append(f"{arm:<22}" + "".join(f"{count:>8}" for count in counts))
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """Return everything measured on the complete arms."""
        preset = self.preset
        complete = self.complete(self.chosen, preset.seeds)
        ended = [arm for arm in self.chosen if self.results(arm, preset.seeds) is not None]
        steps = self.rows // preset.batch * preset.epochs
        made_by = [run["made_by"] for runs in complete.values() for run in runs]
        return {
            "benchmark": f"ablate-{self.name}",
            "made_by": [one for place, one in enumerate(made_by) if one not in made_by[:place]],
            "preset": self.name,
            "description": preset.description,
            "settings": [preset.recipe, *preset.settings],
            "rows": self.rows,
            "steps": steps,
            "samples": steps * preset.batch,
            "temperatures": preset.temperatures,
            "tuning_seeds": preset.tuning_seeds,
            "seeds": preset.seeds,
            "fresh_seeds": preset.fresh_seeds,
            "open": [arm for arm in self.arms if arm not in ended],
            "diverged": [arm for arm in ended if arm not in complete],
            "arms": {arm: self._arm(arm, runs) for arm, runs in complete.items()},
            "baselines": next(
                (run["baselines"] for runs in complete.values() for run in runs if "baselines" in run), {}
            ),
            "differences": ablate_report.compare(complete),
            "confirmation": self._confirmation(),
        }

    def _arm(self, arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "overrides": self.arms[arm],
            **ablate_report.summarise(runs),
            "validation": {
                f"{temperature:g}": score for temperature, score in (self.tuned(arm) or {}).items()
            },
            "runs": runs,
        }

    def _confirmation(self) -> dict[str, Any] | None:
        wanted = self.confirming()
        complete = self.complete(wanted, self.preset.fresh_seeds)
        if not wanted or len(complete) < len(wanted):
            return None
        return {
            "winner": self.winner(),
            "arms": {arm: ablate_report.summarise(runs) | {"runs": runs} for arm, runs in complete.items()},
            "differences": ablate_report.compare(complete),
        }


def work(ablation: Ablation, jobs: int, seconds: float) -> None:
    """Run what is missing, ``jobs`` cells at a time, until all is done or the slice is over."""
    started, longest = time.monotonic(), 0.0
    running: dict[Future[dict[str, Any]], tuple[Cell, float]] = {}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which import torch after this
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, prepare_worker, (os.getpid(),)) as pool:
        while True:
            busy = {cell.name for cell, _ in running.values()}
            free = [cell for cell in ablation.missing() if cell.name not in busy]
            if time.monotonic() - started + 1.2 * longest > seconds:  # arms differ, and so may the next cell
                free = []
            for cell in free[: jobs - len(running)]:
                running[pool.submit(run, cell, ablation.folder)] = (cell, time.monotonic())
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, since = running.pop(future)
                ablation.keep(cell, future.result())
                longest = max(longest, time.monotonic() - since)
                tell(cell, future.result(), time.monotonic() - started)


def tell(cell: Cell, result: dict[str, Any], elapsed: float) -> None:
    scores = result["scores"]
    shown = "diverged" if scores is None else ", ".join(f"{name} {100 * scores[name]:.1f}" for name in TITLES)
    seconds = f"training {result['train_s']:.0f} s ({result['train_cpu_s']:.0f} s of processor)"
    what = f"{cell.arm} t={cell.temperature:g} seed={cell.seed} {cell.part}"
    print(f"[{elapsed:.0f} s] {what}: {shown}; {seconds}", file=sys.stderr, flush=True)


def report(ablation: Ablation, folder: Path, *, with_plot: bool) -> None:
    """Write JSON, table and plot of the complete arms; nothing until the reference arm is complete."""
    document = ablation.document()
    if REFERENCES[0] not in document["arms"]:
        print(f"nothing to report until {REFERENCES[0]} is complete", file=sys.stderr)
        return
    path = folder / f"ablate-{ablation.name}.json"
    write(path, document)
    path.with_suffix(".md").write_text(ablate_report.markdown(document))
    if with_plot and len(document["arms"]) > 1:
        ablate_report.plot(document, path.with_suffix(".png"))


def choose_arms(text: str) -> list[str]:
    """Parse ``all``, ``core``, or names of arms; the others are compared with the first."""
    known = list(arms(1000, 100, 10))
    chosen = {"all": known, "core": list(CORE)}.get(text) or text.split(",")
    if unknown := set(chosen) - set(known):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: allowed are {', '.join(known)}, all, core"
        )
    return [*REFERENCES, *(arm for arm in chosen if arm not in REFERENCES)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="holds train/CLASS and test/CLASS")
    parser.add_argument(
        "--arms", type=choose_arms, default="all", help="all, core, or names separated by commas"
    )
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, one thread each on the CPU")
    parser.add_argument(
        "--slice", type=float, default=float("inf"), help="seconds after which no cell starts"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".data/ablate"), help="folder of the finished cells"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing, report the finished cells")
    parser.add_argument("--no-plot", action="store_true")
    asked = parser.parse_args()
    preset = PRESETS[asked.preset]
    folder = (asked.cache / asked.preset).absolute()
    link_parts(asked.data, folder, preset.per_class, preset.validation_per_class)
    ablation = Ablation(asked.preset, asked.arms, folder)
    if not asked.report:
        work(ablation, asked.jobs, asked.slice)
    print(ablation.progress(), file=sys.stderr)
    report(ablation, asked.out, with_plot=not asked.no_plot)


if __name__ == "__main__":
    main()

"""Measure one rank's share of a sharded bank, and compute from it the step of clusters that cannot be rented.

One process is rank 0 of ``--world``: it holds ``--rows`` rows of 128 dimensions in the sharded bank of
``memory_bank`` under its inverted file, and searches them for the queries of all ranks. The other ranks are
mirrors of it: they send what it would send, at once, so that sizes and work are real and only the network is
missing. Its centroids are trained on rows of its own share (rows are dealt to ranks by their number).

Then a small discrete model: in every step each of W ranks needs the measured time of its parts, times a ratio
drawn from the repeats; the slowest decides; messages take the time of a link of ``--latency`` and
``--bandwidth``.

    python benchmarks/scale.py [--rows 16777216] [--index IVF16384,SQ8]
    python benchmarks/scale.py --measured benchmarks/results/scale.json --bandwidth 1e9
    python benchmarks/scale.py --rows 20000 --index IVF128,SQ8 --world 4    # seconds

Rows are synthetic: groups of alike ones around centres, in a space whose axes fall off as 1/i, as the
spectrum of trained embeddings does.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    Spent,
    context,
    median,
    once,
    pyplot,
    quartiles,
    resident,
    save_plot,
    take_turns,
    write,
)
from torch import Tensor
from torch.nn.functional import normalize

from memory_bank.config import MiningConfig
from memory_bank.miner import Miner
from memory_bank.needs import needs
from memory_bank.retrieval import inverted
from memory_bank.retrieval.exact import Exact
from memory_bank.retrieval.faiss_search import wanted_lists
from memory_bank.retrieval.ivf import Ivf, recall
from memory_bank.sharded import ShardedBank
from memory_bank.sharded_search import ShardedSearch, expected_part

DIM, BATCH, HARD = 128, 256, 256
PIECE = 65_536
CPU = torch.device("cpu")
SIZES, WORLDS = (1_000_000, 100_000_000, 2**30), (8, 64, 512)
STEPS = 200
# Collectives of a step of mining.method=ranked: 3 gathers and 7 swaps, of sizes and then rows, and two sums.
COLLECTIVES = 22


class Mirrors:
    """An Exchange among ``world`` ranks that are all like this one, without a network."""

    rank = 0

    def __init__(self, world: int) -> None:
        self.world = world

    def gather(self, rows: Tensor) -> list[Tensor]:
        return [rows] * self.world

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [parts[0]] * self.world

    def total(self, values: Tensor) -> Tensor:
        return values * self.world


def processors(spent: Sequence[Spent]) -> list[float]:
    """Return processor seconds: on one thread, the seconds of a core that does nothing else."""
    return [one.processor for one in spent]


def synthetic(rows: int, seed: int, groups: int = 20_000) -> Tensor:
    """Return float16 unit rows (rows, 128) of ``groups`` groups."""
    generator = torch.Generator().manual_seed(1 + seed)
    centres, noise = (
        table[torch.randint(len(table), (rows,), generator=generator)] for table in _tables(groups)
    )
    return normalize(centres + noise).half()


@cache
def _tables(groups: int) -> tuple[Tensor, Tensor]:
    """Return centres of groups, and deviations from them."""
    fall, generator = 1 / torch.arange(1, DIM + 1).sqrt(), torch.Generator().manual_seed(0)
    centres = torch.randn(groups, DIM, generator=generator) * fall
    return centres, 0.6 * fall * torch.randn(PIECE, DIM, generator=generator)


def make(rows: int, world: int, factory: str, nprobe: int, device: torch.device) -> tuple[Miner, Ivf]:
    """Make an empty bank of ``rows``, as rank 0 of ``world`` has it; on the meta device without memory."""
    mirrors = Mirrors(world)
    bank = ShardedBank(rows, DIM, dtype=torch.float16, device=device, max_age=None, exchange=mirrors)
    # Trained on this rank's share alone: the mirrors have no rows of their own.
    whole = bank if device.type == "meta" else None
    index = Ivf(bank.local, factory, nprobe=nprobe, min_recall=0.0, seed=0, whole=whole)
    mining = MiningConfig(num_hard=HARD, num_uniform=HARD, band=[0.0, 1e-12], min_fill=0.0)
    return Miner(bank, ShardedSearch(bank, index, mirrors), mining, seed=0), index


def build(options: argparse.Namespace) -> tuple[Miner, Ivf, dict[str, float]]:
    """Fill the share and its index; return the seconds and bytes of each part."""
    made: dict[str, float] = {}
    before = resident()
    miner, index = make(options.rows * options.world, options.world, options.index, options.nprobe, CPU)
    bank = miner.bank
    for start in range(0, options.rows, PIECE):
        slots = torch.arange(start, min(start + PIECE, options.rows))
        bank.local.put(synthetic(len(slots), start), slots, slots, 0)
    made["bank_bytes"] = resident() - before
    sample = index._training_rows(bank.local.id >= 0)
    trained: list[Any] = []
    made["train_s"] = once(lambda: trained.append(inverted.train(options.index, sample, 0))).processor
    del sample
    slots, lists = np.arange(options.rows), np.empty(options.rows, np.int64)

    def assign() -> None:
        for part in inverted.pieces(slots):
            lists[part] = inverted.assign(trained[0], bank.local.read(torch.from_numpy(part)).numpy())

    made["assign_s"] = once(assign).processor
    before = resident()
    made["fill_s"] = once(lambda: index._fill(trained[0], slots, lists)).processor
    made["index_bytes"] = resident() - before
    return miner, index, made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time the parts of a step of this rank."""
    miner, index, made = build(options)
    bank = miner.bank.local
    query, none = synthetic(4 * BATCH, -2).float(), torch.full((4 * BATCH,), -1)
    admissible, part = bank.admissible(1), expected_part(HARD, options.world)

    def search(count: int, nprobe: int) -> Callable[[], object]:
        def step() -> None:
            index.nprobe = nprobe
            index.search(query[:count], none[:count], part, admissible=admissible)

        return step

    few, many, deep = (BATCH, options.nprobe), (4 * BATCH, options.nprobe), (4 * BATCH, 2 * options.nprobe)
    new, rows = synthetic(BATCH, -3), torch.randperm(options.rows)[:BATCH]

    def update() -> None:
        bank.put(new, rows, rows, 1)
        index.update(rows)

    arms = {str(arm): search(*arm) for arm in (few, many, deep)}
    spent = take_turns(arms | {"update": update, "mask": lambda: bank.admissible(1)}, options.repeats)
    index.nprobe = options.nprobe
    some = slice(0, 32)
    found, true = (
        each.search(query[some], none[some], 64, admissible=admissible) for each in (index, Exact(bank))
    )
    at = {name: median(processors(each)) for name, each in spent.items()}
    a_query = (at[str(many)] - at[str(few)]) / (3 * BATCH)
    visited = options.nprobe * options.rows / index.nlist
    a_row = max(0.0, (at[str(deep)] - at[str(many)]) / (4 * BATCH) / visited)
    # The search as the miner calls it: queries of all ranks, the results of all ranks merged.
    whole = once(
        lambda: miner.retrieval.search(query[:BATCH], none[:BATCH], HARD, admissible=admissible)
    ).processor
    return made | {
        "recall_at_64": recall(found, true),
        "query_s": a_query,
        "query_row_s": a_row,
        "query_rest_s": max(0.0, a_query - a_row * visited),
        "search_fixed_s": max(0.0, at[str(few)] - BATCH * a_query),
        "update_s": at["update"],
        "mask_s": at["mask"],
        "ratios": [each / at[str(many)] for each in processors(spent[str(many)])],
        "spread": {name: quartiles(processors(each)) for name, each in spent.items()},
        "whole_search_s": whole,
        "merge_s": max(0.0, whole - options.world * BATCH * a_query - at["mask"]),
        "stated": vars(needs(miner, options.world, BATCH * options.world)),
        "resident_bytes": resident(),
    }


def model(parts: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compute a step of W ranks, each with 256 queries, for every size and W."""
    rng, table = np.random.default_rng(0), []
    measured_lists, code = inverted.parse(options.index)
    for rows in SIZES:
        for world in WORLDS:
            lists = wanted_lists(rows)
            miner, _ = make(rows, world, f"IVF{lists},{code}", options.nprobe, torch.device("meta"))
            stated, batch = needs(miner, world, BATCH * world), BATCH * world
            visited = options.nprobe * rows / world / lists
            # Scale the rest of a query's time with the lists: most of it compares with their centroids.
            a_query = parts["query_rest_s"] * lists / measured_lists + parts["query_row_s"] * visited
            scan = (parts["search_fixed_s"] + parts["mask_s"]) * rows / world / options.rows
            merge = parts["merge_s"] * batch / (BATCH * options.world)
            own = (batch * a_query + scan + merge) / options.cores
            slowest = rng.choice(parts["ratios"], (STEPS, world)).max(1)
            messages = COLLECTIVES * (world - 1) * options.latency
            table.append({
                "rows": rows,
                "ranks": world,
                "lists": lists,
                "rank_gib": (stated.bank + stated.index) / 2**30,
                "first_rank_saves_gib": rows * (2 * DIM + 16) / 2**30,
                "received_mib": stated.traffic / 2**20,
                "search_s": float(np.median(own * slowest)),
                "update_s": parts["update_s"] / options.cores,
                "link_s": messages + stated.traffic / options.bandwidth,
            })  # fmt: skip
    for line in table:
        line["step_s"] = line["search_s"] + line["update_s"] + line["link_s"]
        broken = {
            "search": line["search_s"] > options.step,
            "link": line["link_s"] > options.step,
            "memory": line["rank_gib"] > options.memory,
            "saving": line["first_rank_saves_gib"] > options.memory,
        }
        line["breaks"] = [name for name, is_broken in broken.items() if is_broken]
    return table


def plot(table: list[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for rows in SIZES:
        lines = [line for line in table if line["rows"] == rows]
        worlds = [line["ranks"] for line in lines]
        for axis, name in zip(axes, ("step_s", "rank_gib"), strict=True):
            axis.loglog(worlds, [line[name] for line in lines], "o-", label=f"{rows / 1e6:,.0f} M rows")
    axes[0].axhline(options.step, color="grey", linestyle=":", label="networks of a step")
    axes[1].axhline(options.memory, color="grey", linestyle=":", label="memory of a rank")
    for axis, name in zip(axes, ("seconds of mining a step", "GiB a rank"), strict=True):
        axis.set(xlabel="ranks of 256 queries (computed)", ylabel=name, xticks=WORLDS, xticklabels=WORLDS)
        axis.legend(fontsize=7)
    save_plot(figure, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=2**24, help="rows of this rank; default 2^30 over 64 ranks"
    )
    parser.add_argument("--world", type=int, default=64, help="ranks whose queries this one searches for")
    parser.add_argument("--index", default="IVF16384,SQ8")
    parser.add_argument("--nprobe", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds a message; default 20 us")
    parser.add_argument(
        "--bandwidth", type=float, default=10e9, help="bytes a second into a rank; default 10e9"
    )
    parser.add_argument("--cores", type=int, default=16, help="cores of a rank that search, in the model")
    parser.add_argument("--step", type=float, default=0.25, help="seconds of a step's networks, in the model")
    parser.add_argument("--memory", type=float, default=64.0, help="GiB of a rank's host, in the model")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument(
        "--measured", type=Path, metavar="JSON", help="compute only, from an earlier run's file"
    )
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    inverted.faiss.omp_set_num_threads(1)
    earlier: dict[str, Any] = {}
    if options.measured is None:
        measured = measure(options)
    else:
        earlier = json.loads(options.measured.read_text())
        measured = earlier["measured"]
        vars(options).update(
            {name: earlier["settings"][name] for name in ("rows", "world", "index", "nprobe")}
        )
    table = model(measured, options)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("out", "measured", "no_plot")
    }
    result = earlier if earlier else context("scale", CPU, ("torch", "faiss-cpu", "numpy"))
    result |= {"settings": settings, "measured": measured, "computed": table}
    write(options.out, result)
    for line in table:
        print(
            " ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in line.items()
            )
        )
    if not options.no_plot:
        plot(table, options, options.out.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()

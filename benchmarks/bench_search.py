"""Measure recall@64, microseconds a query, memory, update and training cost by backend and bank size.

The bank holds embeddings of augmented views of real images (embeddings.py); queries are further views of
images that are in the bank, 256 to a call, as in a training step. The backend leaves out a query's own row.
This script leaves out the other views of its image (siblings), from truth and results; so that 64 remain,
every backend is asked for that many more. Random Gaussian rows are the worst case: nothing is near anything.

Arms take turns, so that a disturbance of the machine affects all of them.

    python benchmarks/bench_search.py --images DIR [--rows 50000,200000,1000000] [--threads N]

Embeddings are made at the first run and kept: python benchmarks/embeddings.py --images DIR makes them ahead.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embeddings
import numpy as np
import torch
from common import (
    RESULTS,
    context,
    median,
    once,
    pyplot,
    quartiles,
    ratios,
    resident,
    save_plot,
    take_turns,
    walls,
    whole_numbers,
    write,
)
from embeddings import Rows
from torch import Tensor

from memory_bank.config import BankConfig
from memory_bank.draw import draw_slots
from memory_bank.retrieval import inverted
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.retrieval.exact import Exact
from memory_bank.retrieval.faiss_search import wanted_lists
from memory_bank.retrieval.flat import Flat
from memory_bank.retrieval.ivf import Ivf, recall
from memory_bank.storage import Storage, build_storage

K = 64
BATCH = 256
QUERIES = 1024  # for recall; time is that of the first batch
CODES = ("Flat", "SQfp16", "SQ8", "PQ32", "RaBitQ")
NPROBES = (4, 8, 16, 32, 64, 128)
ROUNDS_OF_UPDATES = 9
PIECE = 65_536
CPU = torch.device("cpu")
GOAL = {"rows": 1_000_000, "recall": 0.95, "speedup": 20.0, "update_ms": 15.0, "bank_memory": 1.2}


@dataclass
class World:
    """A bank, and queries with their images.

    Attributes:
        source: Image of each row of the bank.
        query: float32 (q, d).
        query_source: Image of each query, which is also the slot of its own row.
    """

    bank: Storage
    source: Tensor
    query: Tensor
    query_source: Tensor
    siblings: int

    def search(self, backend: Retrieval, rows: slice) -> Candidates:
        return backend.search(
            self.query[rows], self.query_source[rows], K + self.siblings, admissible=self.bank.admissible(0)
        )

    def neighbours(self, backend: Retrieval) -> Candidates:
        """Return the 64 closest rows of other images for every query."""
        parts = []
        for start in range(0, len(self.query), BATCH):
            rows = slice(start, start + BATCH)
            parts.append(self._without_siblings(self.search(backend, rows), self.query_source[rows]))
        return Candidates(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("slots", "similarity")),
            rows=torch.cat([part.rows for part in parts]),
            above=torch.cat([part.above for part in parts]),
            share=1.0,
        )

    def _without_siblings(self, found: Candidates, own: Tensor) -> Candidates:
        sibling = self.source[found.slots.clamp_min(0)] == own[:, None]
        similarity = found.similarity.masked_fill(sibling, -torch.inf)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        slots = found.slots.gather(1, order).masked_fill(similarity == -torch.inf, -1)
        return Candidates(slots[:, :K], similarity[:, :K], found.rows, found.above, found.share)


@dataclass
class Index:
    """A backend with the cost of building it; ``made`` goes into the JSON."""

    name: str
    backend: Retrieval
    nprobes: tuple[int | None, ...] = (None,)
    made: dict[str, Any] = field(default_factory=dict)

    def arms(self, world: World) -> Iterator[tuple[str, Callable[[], Candidates]]]:
        for nprobe in self.nprobes:
            yield self.arm(nprobe), lambda nprobe=nprobe: self.search(world, nprobe, slice(0, BATCH))

    def arm(self, nprobe: int | None) -> str:
        return self.name if nprobe is None else f"{self.name} nprobe {nprobe}"

    def visit(self, nprobe: int | None) -> Retrieval:
        if nprobe is not None:
            assert isinstance(self.backend, Ivf)
            self.backend.nprobe = nprobe
        return self.backend

    def search(self, world: World, nprobe: int | None, rows: slice) -> Candidates:
        return world.search(self.visit(nprobe), rows)


def make_world(made: Rows, rows: int) -> World:
    bank = build_storage(BankConfig(), rows=rows, dim=made.keys.shape[1], device=CPU)
    for ids in torch.arange(rows).split(PIECE):
        bank.write(made.keys[ids], ids, 0)
    query, source = made.keys[rows:].float(), made.source[rows:]
    if made.images >= rows:  # one row an image, or fewer: a query may come from outside
        source = torch.where(source < rows, source, -1)
    return World(bank, made.source[:rows], query, source, siblings=-(-rows // made.images) - 1)


def make_indexes(world: World, codes: tuple[str, ...]) -> Iterator[Index]:
    yield Index("exact torch", Exact(world.bank))
    yield _flat(world.bank)
    for code in codes:
        yield _inverted(world.bank, code)


def _flat(bank: Storage) -> Index:
    before = resident()
    backend = Flat(bank)
    taken = once(lambda: backend.load_state_dict({}))  # copies the bank
    made = {"fill_s": taken.wall, "code_bytes_a_row": 4 * bank.dim, "bytes_a_row": _grown(before, bank)}
    return Index("faiss Flat", backend, made=made)


def _inverted(bank: Storage, code: str) -> Index:
    """Build an index in the three parts that a retraining consists of, so that each is timed."""
    factory = f"IVF{lists_for(bank.capacity)},{code}"
    backend = Ivf(bank, factory, nprobe=1, min_recall=0.0, seed=0)
    found: dict[str, Any] = {}
    training = once(lambda: found.update(trained=inverted.train(factory, _sample(bank, backend.nlist), 0)))
    assigning = once(lambda: found.update(lists=_assigned(bank, found["trained"])))
    before = resident()
    filling = once(lambda: backend.load_state_dict(_state(found["trained"], found["lists"], backend.nlist)))
    made = {
        "train_s": training.wall,
        "train_processor_s": training.processor,
        "assign_s": assigning.wall,
        "assign_processor_s": assigning.processor,
        "fill_s": filling.wall,
        "code_bytes_a_row": inverted.faiss.index_factory(bank.dim, factory).sa_code_size(),
        "bytes_a_row": _grown(before, bank),
    }
    nprobes = tuple(nprobe for nprobe in NPROBES if nprobe <= backend.nlist)
    return Index(f"faiss {factory}", backend, nprobes, made)


def lists_for(rows: int) -> int:
    """Return the lists of mining.index=auto: a power of two near 4 sqrt(n) that half the bank can train."""
    affordable = rows // 2 // inverted.ROWS_PER_LIST
    return min(wanted_lists(rows), 1 << max(0, affordable.bit_length() - 1))


def _sample(bank: Storage, nlist: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    drawn = draw_slots(bank.admissible(0), 2 * inverted.ROWS_PER_LIST * nlist, 0)
    return bank.read(drawn[drawn >= 0]).numpy()


def _assigned(bank: Storage, trained: inverted.Trained) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([inverted.assign(trained, part.float().numpy()) for part in bank.key.split(PIECE)])


def _state(
    trained: inverted.Trained, lists: np.ndarray[Any, np.dtype[np.int64]], nlist: int
) -> dict[str, Any]:
    return {
        "nprobe": 1,
        "recall": math.nan,
        "written": 0,
        "centroids": trained.centroids,
        "code": trained.code,
        "slots": torch.from_numpy(np.argsort(lists, kind="stable")),
        "sizes": torch.from_numpy(np.bincount(lists, minlength=nlist)),
    }


def _grown(before: int, bank: Storage) -> float | None:
    return (resident() - before) / bank.capacity if before else None


def updates(index: Index, world: World) -> Callable[[], None]:
    """Replace 256 rows in the bank and the index. Every arm writes the same rows in the same round."""
    generator = torch.Generator().manual_seed(1)
    bank, rounds = world.bank, ROUNDS_OF_UPDATES + 1
    drawn = torch.randperm(bank.capacity, generator=generator)[: 2 * BATCH * rounds].view(rounds, 2, -1)
    turn = itertools.cycle([(ids, bank.read(other)) for ids, other in drawn])

    def step() -> None:
        ids, keys = next(turn)
        index.backend.update(bank.write(keys, ids, 0))

    return step


def measure(
    made: Rows, rows: int, data: str, codes: tuple[str, ...], repeats: int
) -> tuple[list[Any], list[Any]]:
    """Return the rows of two tables: indexes, and searches of each at every nprobe."""
    world = make_world(made, rows)
    print(
        f"\n{rows} rows, {data} ({made.origin}; {made.images} images); {K + world.siblings} looked up",
        flush=True,
    )
    indexes = []
    for index in make_indexes(world, codes):
        cost = ", ".join(f"{name} {value:.4g}" for name, value in index.made.items() if value is not None)
        print(f"  made {index.name}: {cost}", flush=True)
        indexes.append(index)
    recalls = _recalls(indexes, world)
    arms = {name: step for index in indexes for name, step in index.arms(world)}
    spent = take_turns(arms, repeats)
    renewed = take_turns({index.name: updates(index, world) for index in indexes}, ROUNDS_OF_UPDATES)
    bank_bytes = sum(getattr(world.bank, part).nbytes for part in ("key", "id", "written_at")) / rows
    base = {"rows": rows, "data": data}
    made_rows = [
        base
        | {"index": index.name, **index.made, "bank_bytes_a_row": bank_bytes}
        | {"update_ms": 1e3 * median(walls(renewed[index.name]))}
        | {"update_ms_quartiles": [1e3 * value for value in quartiles(walls(renewed[index.name]))]}
        for index in indexes
    ]
    searches = []
    for index, nprobe in [(made, nprobe) for made in indexes for nprobe in made.nprobes]:
        arm = index.arm(nprobe)
        times = [1e6 * wall / BATCH for wall in walls(spent[arm])]
        faster = ratios(spent["exact torch"], spent[arm])
        searches.append(
            base
            | {"index": index.name, "nprobe": nprobe, "recall": recalls[arm]}
            | {"us_a_query": median(times), "us_a_query_quartiles": quartiles(times)}
            | {"faster_than_exact": median(faster), "faster_than_exact_quartiles": quartiles(faster)}
            | {"processor_us_a_query": 1e6 * median([one.processor for one in spent[arm]]) / BATCH}
        )
    _show(made_rows, searches)
    return made_rows, searches


def _recalls(indexes: list[Index], world: World) -> dict[str, float]:
    true = world.neighbours(indexes[0].backend)
    return {
        index.arm(nprobe): recall(world.neighbours(index.visit(nprobe)), true)
        for index in indexes
        for nprobe in index.nprobes
    }


def _show(made: list[Any], searches: list[Any]) -> None:
    by_name = {row["index"]: row for row in made}
    print(
        f"{'rows':>8} {'index':22} {'nprobe':>6} {'recall@64':>9} {'us/query':>9} {'quartiles':>17} "
        f"{'x exact':>8} {'B/row':>6} {'upd ms':>7} {'train s':>8}"
    )
    for row in searches:
        low, high = row["us_a_query_quartiles"]
        index = by_name[row["index"]]
        own = index.get("bytes_a_row")
        total = index["bank_bytes_a_row"] + (own if own is not None else index.get("code_bytes_a_row", 0))
        training = index.get("train_s", 0.0) + index.get("assign_s", 0.0)
        print(
            f"{row['rows']:8} {row['index']:22} {row['nprobe'] or '-':>6} {row['recall']:9.3f} "
            f"{row['us_a_query']:9.1f} {low:8.1f} {high:8.1f} {row['faster_than_exact']:8.1f} {total:6.0f} "
            f"{index['update_ms']:7.2f} {training:8.1f}",
            flush=True,
        )


def goal(made: list[Any], searches: list[Any]) -> dict[str, Any] | None:
    """Return the fastest search at the goal's rows with the goal's recall; None if no bank was that large.

    ``bank_memory``: bytes of the bank, with ids and steps and without the index, over those of its fp16 keys.
    """
    able = [
        row
        for row in searches
        if row["rows"] >= GOAL["rows"] and row["data"] == "trained" and row["recall"] >= GOAL["recall"]
    ]
    if not able:
        return None
    best = max(able, key=lambda row: row["faster_than_exact"])
    names = ("rows", "data", "index")
    index = next(row for row in made if all(row[name] == best[name] for name in names))
    update, memory = index["update_ms"], index["bank_bytes_a_row"] / (2 * embeddings.DIM)
    met = best["faster_than_exact"] >= GOAL["speedup"] and update <= GOAL["update_ms"]
    met = met and memory <= GOAL["bank_memory"]
    return {"asked": GOAL, "best": best, "update_ms": update, "bank_memory": memory, "met": met}


def plot(searches: list[Any], path: Path) -> None:
    plt = pyplot()
    panels = list(dict.fromkeys((row["rows"], row["data"]) for row in searches))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (rows, data) in zip(axes[0], panels, strict=True):
        here = [row for row in searches if (row["rows"], row["data"]) == (rows, data)]
        for name in dict.fromkeys(row["index"] for row in here):
            points = [row for row in here if row["index"] == name]
            label = name.removeprefix("faiss ")
            style = "o-" if len(points) > 1 else "*"
            axis.plot(
                [p["us_a_query"] for p in points], [p["recall"] for p in points], style, ms=5, label=label
            )
        axis.set(title=f"{rows:,} rows, {data}", xscale="log", xlabel="microseconds a query", ylim=(0, 1.03))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("recall@64")
    save_plot(figure, path)
    plt.close(figure)


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    embeddings.add_arguments(parser)
    parser.add_argument("--rows", type=whole_numbers, default=[50_000, 200_000, 1_000_000])
    parser.add_argument(
        "--codes", type=_codes, default=CODES, help=f"codes of the inverted lists; default {','.join(CODES)}"
    )
    parser.add_argument("--gaussian-rows", type=int, default=200_000, help="rows of the worst case; 0: none")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch and FAISS; default: their own choice")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_search.json")
    parser.add_argument("--plot", type=Path, help="PNG or SVG; default beside --out")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: a spread needs 2 or more")
    least = 2 * BATCH * (ROUNDS_OF_UPDATES + 1)
    if min(options.rows) < least:
        parser.error(f"--rows {min(options.rows)}: {least} or more are needed")
    if not options.no_plot:
        pyplot()  # report a missing package before the work, not after it
    if options.threads:
        torch.set_num_threads(options.threads)
    made, searches, source = [], [], embeddings.Source(options)
    for rows in options.rows:
        found = measure(source.rows(rows + QUERIES), rows, "trained", options.codes, options.repeats)
        made, searches = made + found[0], searches + found[1]
    if options.gaussian_rows:
        worst = embeddings.gaussian(options.gaussian_rows + QUERIES)
        found = measure(worst, options.gaussian_rows, "Gaussian", ("SQ8",), options.repeats)
        made, searches = made + found[0], searches + found[1]
    reached = goal(made, searches)
    about = context(
        "search",
        CPU,
        ("torch", "faiss-cpu", "numpy"),
        batch=BATCH,
        k=K,
        repeats=options.repeats,
        update_repeats=ROUNDS_OF_UPDATES,
        recall_queries=QUERIES,
        images=options.images.name if options.images else "digits",
        encoder=f"resnet10, width 16, {options.epochs} epochs",
    )
    write(options.out, about | {"goal": reached, "indexes": made, "searches": searches})
    if reached is not None:
        best = reached["best"]
        print(
            f"goal {'met' if reached['met'] else 'missed'}: {best['index']} nprobe {best['nprobe']}: "
            f"{best['faster_than_exact']:.1f}x exact torch at recall {best['recall']:.3f} "
            f"(goal: {GOAL['speedup']:.0f}x at {GOAL['recall']}), update of {BATCH} in "
            f"{reached['update_ms']:.1f} ms (goal: {GOAL['update_ms']:.0f}), "
            f"bank {reached['bank_memory']:.2f}x its fp16 keys (goal: {GOAL['bank_memory']})"
        )
    if not options.no_plot:
        plot(searches, options.plot or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""A bank in parts against the same bank in one piece; ranks are threads here, processes in tests/faults."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memory_bank import sharded, sharded_search
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.draw import draw_slots, shuffled
from memory_bank.methods.all_rows import AllRows
from memory_bank.miner import build_miner
from memory_bank.registry import BACKENDS
from memory_bank.retrieval import ivf
from memory_bank.retrieval.exact import Exact

ROWS, DIM, BATCH = 203, 6, 12


class Room:
    """Where threads exchange: each leaves its own and, when all have, takes everyone's."""

    def __init__(self, world):
        self.world, self._left, self._barrier = world, [None] * world, threading.Barrier(world, timeout=30)

    def all_of(self, rank, value):
        self._left[rank] = value
        self._barrier.wait()
        found = list(self._left)
        self._barrier.wait()
        return found


class Seat:
    """One rank's Exchange; its look-ahead thread meets those of the others in a room of their own."""

    def __init__(self, rooms, rank):
        self._rooms, self.rank, self.world = rooms, rank, rooms[0].world

    @property
    def _room(self):
        return self._rooms[threading.current_thread().name == "look-ahead"]

    def gather(self, rows):
        return self._room.all_of(self.rank, rows)

    def swap(self, parts):
        found = [theirs[self.rank] for theirs in self._room.all_of(self.rank, list(parts))]
        # As between processes, where the width of what comes is taken from what is sent.
        assert all(part.shape[1:] == parts[0].shape[1:] for part in found)
        return found

    def total(self, values):
        return torch.stack(self._room.all_of(self.rank, values)).sum(0)


def unit(rows, seed):
    return torch.nn.functional.normalize(
        torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def make(mining, exchange=None, **bank):
    config = BankConfig(placement="replicated" if exchange is None else "sharded", **bank)
    return build_miner(
        config,
        mining,
        rows=ROWS,
        dim=DIM,
        seed=3,
        device=torch.device("cpu"),
        exchange=exchange,
        upcoming=lambda step: rows_of(step) if step < 20 else None,
    )


def on_ranks(world, work):
    """``work(exchange)`` on a thread a rank; results by rank."""
    rooms = Room(world), Room(world)
    with ThreadPoolExecutor(world) as pool:
        return [job.result(60) for job in [pool.submit(work, Seat(rooms, rank)) for rank in range(world)]]


def rows_of(step):
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[: 5 * BATCH]


def steps(miner, rank=0, world=1, first=0, last=6):
    """Negatives of this rank's share of each step's batch; every step's keys are written by all."""
    found = []
    for step in range(first, last):
        ids = rows_of(step)
        keys, share = unit(len(ids), 100 + step), len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)
        query = unit(len(ids), 200 + step)
        found.append(
            miner.negatives(query[mine], keys[mine], ids[mine], step, batch_keys=keys, batch_ids=ids)
        )
        miner.write(keys, ids, step)
    return found


def assert_equal(whole, parts):
    """Negatives of one process against those of the ranks, put together."""
    for step, one in enumerate(whole):
        shares = [part[step] for part in parts]
        hard = torch.cat([share.hard[share.hard_index] for share in shares])
        torch.testing.assert_close(hard, one.hard[one.hard_index], rtol=1e-6, atol=1e-6)
        for name in ("hard_log_weight", "hard_ids", "shared_log_weight", "extra_positives"):
            joined = torch.cat([getattr(share, name) for share in shares])
            torch.testing.assert_close(joined, getattr(one, name), rtol=1e-6, atol=1e-6)
        for share in shares:
            assert torch.equal(share.shared_ids, one.shared_ids)
            assert torch.equal(share.shared, one.shared)


MININGS = {
    "band": {"band": [0.05, 0.4], "class_prior": 0.02},
    "hardest": {"band": [0.0, 0.05], "relative_margin": 0.1},
    "deeper than a part": {"backend": "exact", "band": [0.0, 1.0]},
    "index deeper than a part": {"backend": "faiss", "band": [0.0, 0.9]},
    "index": {"backend": "faiss", "band": [0.0, 0.3]},
    "sample": {"backend": "subsample", "sample": 50, "band": [0.0, 1.0]},
    "attract": {"false_negative": "attract", "false_negative_threshold": 0.3},
    "estimate": {"method": "full_bank"},
    "all rows": {"method": "all_rows"},
    "inverted file": {
        "min_fill": 0.5,
        "backend": "faiss",
        "index": "IVF2,Flat",
        "nprobe": 1,
        "band": [0.0, 0.3],
    },
    "stored": {"query": "stored", "band": [0.0, 0.4]},
    "stored, three ahead": {"query": "stored", "lag": 3, "method": "full_bank"},
    "stored, overlapped": {"query": "stored", "overlap": True, "lag": 2, "band": [0.0, 0.4]},
    "stored, sample": {"query": "stored", "backend": "subsample", "sample": 50, "band": [0.0, 1.0]},
    "stored, inverted file": {
        "query": "stored",
        "min_fill": 0.5,
        "backend": "faiss",
        "index": "IVF2,Flat",
        "nprobe": 1,
        "relative_margin": 0.1,
    },
}
BANK_METRICS = ("bank/fill", "bank/age_mean", "bank/admissible", "bank/refused")
QUEUES = ("band", "sample", "estimate", "all rows", "inverted file")
"""Kinds of mining that a queue is tested with, too."""


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("name", "bank"),
    [(name, {}) for name in MININGS] + [(name, {"kind": "queue", "capacity": 170}) for name in QUEUES],
)
def test_sharded_negatives_are_those_of_one_bank(name, bank, world):
    mining = MiningConfig(num_hard=5, num_uniform=9, **{"min_fill": 0.3, **MININGS[name]})
    whole = make(mining, max_age=4, **bank)
    expected = steps(whole)
    assert mining.method == "all_rows" or any(one.hard_ids.numel() for one in expected)

    def work(exchange):
        miner = make(mining, exchange, max_age=4, **bank)
        found = steps(miner, exchange.rank, world)
        near = miner.nearest(unit(3, exchange.rank), torch.tensor([1, -1, exchange.rank]), 6, 4)
        return found, near, miner.state_dict()["bank"], miner.bank.local.key.nbytes, miner.metrics()

    parts = on_ranks(world, work)
    assert_equal(expected, [part[0] for part in parts])
    for rank, part in enumerate(parts):
        near = whole.nearest(unit(3, rank), torch.tensor([1, -1, rank]), 6, 4)
        assert torch.equal(part[1][0], near[0])
        torch.testing.assert_close(part[1][1], near[1])
        assert part[3] <= -(-ROWS // world) * DIM * 2
        assert {n: part[4][n] for n in BANK_METRICS} == {n: whole.metrics()[n] for n in BANK_METRICS}
    saved = whole.state_dict()["bank"]
    assert saved.keys() == parts[0][2].keys()
    assert all(torch.equal(saved[key], value) for key, value in parts[0][2].items() if key != "kind")
    assert "key" not in parts[1][2]


SPREADS = {
    "plain": [(2, 3), (3, 1), (1, 2), (None, 3), (2, None)],
    "inverted file": [(2, 2), (3, 2), (None, 2), (2, None)],
    "queue": [(2, 3), (None, 2), (3, None)],
}
"""Processes before and after a resume; None is one bank in one piece."""


@pytest.mark.parametrize(
    ("name", "before", "after"), [(name, *change) for name, changes in SPREADS.items() for change in changes]
)
def test_a_bank_is_loaded_however_it_is_spread(name, before, after, monkeypatch):
    """The steps to come are those of a miner that never stopped, also if new centroids are being trained."""
    monkeypatch.setattr(ivf, "_RETRAIN_STEPS", 2)
    bank = {"kind": "queue", "capacity": 170} if name == "queue" else {}
    own = {"band": [0.0, 0.4], "min_fill": 0.4}
    if name == "inverted file":
        # At step 5 the bank was rewritten since the training in step 2, so that new centroids are trained.
        own |= {"backend": "faiss", "index": "IVF2,Flat", "nprobe": 1, "min_recall": 0.99}
        own |= {"query": "stored", "recall_every": 5}
    mining = MiningConfig(num_hard=5, num_uniform=9, **own)
    reference = make(mining, **bank)
    expected = steps(reference, last=12)

    def run(first, last, state=None):
        def work(exchange=None):
            miner = make(mining, exchange, **bank)
            if state is not None:
                miner.load_state_dict(state)
            rank, world = (0, 1) if exchange is None else (exchange.rank, exchange.world)
            return steps(miner, rank, world, first, last), miner.state_dict(), miner.metrics()

        return work

    def go(world, work):
        return [work()] if world is None else on_ranks(world, work)

    started = go(before, run(0, 6))
    assert ("retraining" in started[0][1]["retrieval"]) == (name == "inverted file")
    ended = go(after, run(6, 12, started[0][1]))
    assert_equal(expected[:6], [part[0] for part in started])
    assert_equal(expected[6:], [part[0] for part in ended])
    for part in ended:
        assert {key: part[2][key] for key in reference.retrieval.metrics()} == reference.retrieval.metrics()
    if name == "inverted file":
        one, other = reference.state_dict()["retrieval"], ended[0][1]["retrieval"]
        assert one.keys() == other.keys()
        assert one["written"] == other["written"]
        assert torch.equal(one["centroids"], other["centroids"])
        assert torch.equal(one["sizes"], other["sizes"])
        assert torch.equal(one["slots"].sort().values, other["slots"].sort().values)


@pytest.mark.parametrize("name", ["index", "hardest", "deeper than a part", "inverted file"])
def test_a_rank_that_has_more_than_its_part_of_the_closest_is_asked_again(name, monkeypatch):
    asked, original = [], sharded_search.ShardedSearch._merge

    def noted(self, candidates, sizes, count, k):
        asked.append(count)
        return original(self, candidates, sizes, count, k)

    monkeypatch.setattr(sharded_search, "expected_part", lambda k, world: 2)
    monkeypatch.setattr(sharded_search.ShardedSearch, "_merge", noted)
    mining = MiningConfig(num_hard=5, num_uniform=9, **{"min_fill": 0.3, **MININGS[name]})
    parts = on_ranks(3, lambda exchange: steps(make(mining, exchange), exchange.rank, 3))
    assert_equal(steps(make(mining)), parts)
    assert min(asked) == 2 < max(asked)


def test_a_part_is_seldom_exceeded_and_small():
    generator = torch.Generator().manual_seed(0)
    for k, world in [(256, 2), (256, 64), (64, 8), (2048, 512)]:
        part = sharded_search.expected_part(k, world)
        dealt = torch.randint(0, world, (500, k), generator=generator)
        assert max(int(torch.bincount(each).max()) for each in dealt) < part
        assert part <= k / world + 6 * (k / world) ** 0.5 + 9
    assert sharded_search.expected_part(5, 2) == 5


def test_codes_find_no_row_less_than_those_of_one_bank():
    """Each rank returns the best by code of its own rows, so that together they return more than one bank."""
    own = {"backend": "faiss", "index": "IVF2,RaBitQ", "nprobe": 2, "min_fill": 0.5, "band": [0.0, 1e-9]}
    mining = MiningConfig(num_hard=20, num_uniform=0, **own)
    whole = steps(make(mining))
    parts = on_ranks(2, lambda exchange: steps(make(mining, exchange), exchange.rank, 2))
    found = 0
    for step, one in enumerate(whole):
        query = unit(5 * BATCH, 200 + step)
        hard = torch.cat([part[step].hard[part[step].hard_index] for part in parts])
        similarity = torch.einsum("bkd,bd->bk", hard, query)
        assert (similarity >= torch.einsum("bkd,bd->bk", one.hard[one.hard_index], query) - 1e-6).all()
        found += similarity.numel()
    assert found


@pytest.mark.parametrize("share", [0.9, 0.01])
def test_a_draw_examines_no_more_than_it_needs_and_is_that_of_one_bank(share, monkeypatch):
    rows = 50_000
    held = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < share
    examined = []
    monkeypatch.setattr(
        sharded, "shuffled", lambda slots, *rest: examined.append(len(slots)) or shuffled(slots, *rest)
    )

    def work(exchange):
        options = {"dtype": torch.float16, "device": torch.device("cpu"), "max_age": None}
        bank = sharded.ShardedBank(rows, 1, exchange=exchange, **options)
        return bank.draw(held[exchange.rank :: 2], 100, 7)

    expected = draw_slots(held, 100, 7)
    assert (expected >= 0).all()
    assert all(torch.equal(drawn, expected) for drawn in on_ranks(2, work))
    assert max(examined) < (1000 if share > 0.5 else 30_000)


def test_keys_that_are_not_finite_are_counted_over_all_ranks():
    def work(exchange):
        miner = make(MiningConfig(), exchange)
        keys = unit(4, 0)
        keys[1] = torch.nan
        miner.write(keys, torch.tensor([4, 5, 6, 7]), 0)
        return miner.state_dict()["bank"]

    saved = on_ranks(2, work)[0]
    assert int(saved["refused"]) == 1
    assert saved["id"][[4, 5, 6, 7]].tolist() == [4, -1, 6, 7]


class Half(Exact):
    """Find the closer half of what is asked for, and remember how that was judged."""

    approximate = True

    def __init__(self, bank):
        super().__init__(bank)
        self.judged = []

    def search(self, query, ids, k, **how):
        return super().search(query, ids, k // 2, **how)

    def act_on_recall(self, neighbours, k, step):
        self.judged.append((*neighbours.tolist(), k, step))


def test_any_approximate_search_is_judged_by_the_recall_over_all_ranks(monkeypatch):
    monkeypatch.setitem(BACKENDS, "half", lambda spec: spec.spread(Half(spec.part)))

    def work(exchange):
        mining = MiningConfig(num_hard=4, num_uniform=4, min_fill=0.3, backend="half", recall_every=5)
        miner = make(mining, exchange)
        steps(miner, exchange.rank, 2)
        return miner.retrieval._inner.judged

    one, other = on_ranks(2, work)
    assert one == other
    ((found, neighbours, _, step),) = one
    assert step == 5
    assert 0.4 < found / neighbours < 1


class ReadsKeys(AllRows):
    reads_every_row = True


@pytest.mark.parametrize(
    ("method", "says"), [(ReadsKeys(), "use bank.every_row()"), (AllRows(), "argument exchange")]
)
def test_what_a_part_cannot_serve_is_refused(method, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        build_miner(
            BankConfig(placement="sharded"),
            MiningConfig(),
            method=method,
            rows=ROWS,
            dim=DIM,
            seed=0,
            device=torch.device("cpu"),
            upcoming=lambda step: None,
        )


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(ValueError, match="2 rows over 3 ranks leave one empty"):
        build_miner(
            BankConfig(placement="sharded"),
            MiningConfig(),
            rows=2,
            dim=2,
            seed=0,
            device=torch.device("cpu"),
            exchange=Seat([Room(3)] * 2, 0),
        )

"""A bank in parts against the same bank in one piece; ranks are threads here, processes in tests/faults."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import build_miner

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
    """One thread's Exchange."""

    def __init__(self, room, rank):
        self._room, self.rank, self.world = room, rank, room.world

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
        config, mining, rows=ROWS, dim=DIM, seed=3, device=torch.device("cpu"), exchange=exchange
    )


def on_ranks(world, work):
    """``work(exchange)`` on a thread a rank; results by rank."""
    room = Room(world)
    with ThreadPoolExecutor(world) as pool:
        return [job.result(60) for job in [pool.submit(work, Seat(room, rank)) for rank in range(world)]]


def steps(miner, rank=0, world=1, first=0, last=6):
    """Negatives of this rank's share of each step's batch; every step's keys are written by all."""
    found = []
    for step in range(first, last):
        ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[: 5 * BATCH]
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
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", MININGS)
def test_sharded_negatives_are_those_of_one_bank(name, world):
    mining = MiningConfig(num_hard=5, num_uniform=9, min_fill=0.3, **MININGS[name])
    whole = make(mining, max_age=4)
    expected = steps(whole)
    assert any(one.hard_ids.numel() for one in expected)

    def work(exchange):
        miner = make(mining, exchange, max_age=4)
        found = steps(miner, exchange.rank, world)
        near = miner.nearest(unit(3, exchange.rank), torch.tensor([1, -1, exchange.rank]), 6, 4)
        return found, near, miner.state_dict()["bank"], miner.bank.local.key.nbytes

    parts = on_ranks(world, work)
    assert_equal(expected, [part[0] for part in parts])
    for rank, part in enumerate(parts):
        near = whole.nearest(unit(3, rank), torch.tensor([1, -1, rank]), 6, 4)
        assert torch.equal(part[1][0], near[0])
        torch.testing.assert_close(part[1][1], near[1])
        assert part[3] <= -(-ROWS // world) * DIM * 2
    saved = whole.state_dict()["bank"]
    assert saved.keys() == parts[0][2].keys()
    assert all(torch.equal(saved[key], value) for key, value in parts[0][2].items() if key != "kind")
    assert "key" not in parts[1][2]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2), (None, 3), (2, None)])
def test_a_bank_is_loaded_however_it_is_spread(before, after):
    """None is one bank in one piece; then the steps to come are those of a miner that never stopped."""
    mining = MiningConfig(num_hard=5, num_uniform=9, min_fill=0.3, band=[0.0, 0.4])
    expected = steps(make(mining))

    def run(first, last, state=None):
        def work(exchange=None):
            miner = make(mining, exchange)
            if state is not None:
                miner.load_state_dict(state)
            rank, world = (0, 1) if exchange is None else (exchange.rank, exchange.world)
            return steps(miner, rank, world, first, last), miner.state_dict()

        return work

    def go(world, work):
        return [work()] if world is None else on_ranks(world, work)

    started = go(before, run(0, 3))
    ended = go(after, run(3, 6, started[0][1]))
    assert_equal(expected[:3], [part[0] for part in started])
    assert_equal(expected[3:], [part[0] for part in ended])


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


@pytest.mark.parametrize(
    ("bank", "mining", "says"),
    [
        ({}, {"method": "all_rows"}, "mining.method=all_rows"),
        ({}, {"query": "stored"}, "mining.query=stored"),
        ({}, {"backend": "faiss", "index": "IVF4,Flat"}, "mining.index=IVF4,Flat"),
        ({"kind": "queue", "capacity": 8}, {}, "bank.kind=queue have no owner"),
        ({}, {}, "argument exchange"),
    ],
)
def test_what_a_part_cannot_serve_is_refused(bank, mining, says):
    with pytest.raises(ValueError, match=says):
        build_miner(
            BankConfig(placement="sharded", **bank),
            MiningConfig(**mining),
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
            exchange=Seat(Room(3), 0),
        )

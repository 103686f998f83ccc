"""Stated memory and traffic against what ranks (threads here) hold and receive."""

import pytest

from memory_bank.config import MiningConfig
from memory_bank.methods.base import Mined, MiningMethod, distinct, with_hard
from memory_bank.needs import needs
from memory_bank.negatives import Negatives, log_mask
from memory_bank.registry import METHODS
from tests.memory_bank.test_sharded import BATCH, ROWS, Seat, make, on_ranks, rows_of, steps, unit

MININGS = {
    "look-ups": {"band": [0.0, 0.3]},
    "stored": {"query": "stored", "band": [0.0, 0.3]},
    "sample": {"backend": "subsample", "sample": 50, "band": [0.0, 1.0]},
    "all rows": {"method": "all_rows"},
    "the batch alone": {"method": "in_batch"},
    "all rows, of one's own": {"method": "own_rows"},
    "no uniform rows": {"method": "nearest", "num_uniform": 2000},
}


class OwnRows(MiningMethod):
    """Push from every row, also from those of the batch."""

    gathers_every_row, reads = True, frozenset()

    def depth(self, config, rows):
        return 0

    def negatives(self, batch, bank, look_up, config):
        keys, ids, there = bank.every_row(bank.admissible(batch.step))
        apart = ~there[None] | (ids[None] == batch.ids[:, None])
        return Mined(Negatives.none(batch.query).with_shared(keys, ids, log_mask(apart)))


class Nearest(MiningMethod):
    reads = frozenset({"num_hard"})

    def negatives(self, batch, bank, look_up, config):
        nearest = look_up(bank.admissible(batch.step))
        return Mined(with_hard(Negatives.none(batch.query), bank, *distinct(nearest.slots)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", MININGS)
def test_a_step_receives_what_is_stated(name, world, monkeypatch):
    received = [0] * world
    monkeypatch.setitem(METHODS, "own_rows", OwnRows)
    monkeypatch.setitem(METHODS, "nearest", Nearest)

    def counted(method):
        def call(self, values):
            found = method(self, values)
            parts = found if isinstance(found, list) else [found]
            received[self.rank] += sum(part.nbytes for part in parts)
            return found

        return call

    for method in ("gather", "swap", "total"):
        monkeypatch.setattr(Seat, method, counted(getattr(Seat, method)))

    def work(exchange):
        miner = make(
            MiningConfig(**{"num_hard": 5, "num_uniform": 9, "min_fill": 0.3} | MININGS[name]), exchange
        )
        steps(miner, exchange.rank, world)
        before = received[exchange.rank]
        ids, share = rows_of(6), 5 * BATCH // world
        mine, keys = slice(exchange.rank * share, (exchange.rank + 1) * share), unit(5 * BATCH, 106)
        miner.negatives(keys[mine], keys[mine], ids[mine], 6, batch_keys=keys, batch_ids=ids)
        miner.write(keys, ids, 6)
        stated = needs(miner, world, 5 * BATCH)
        held = sum(part.nbytes for part in (miner.bank.key, miner.bank.id, miner.bank.written_at))
        return received[exchange.rank] - before, stated, held

    for got, stated, held in on_ranks(world, work):
        assert 0 <= stated.bank - held <= held / (ROWS // world)  # one row less on some ranks
        # At most as much: rows that are mined for several queries are sent once. Little more for counts.
        assert 0.6 * stated.traffic <= got <= 1.15 * stated.traffic


def test_an_index_is_stated_for_each_backend():
    flat = make(MiningConfig(backend="faiss", index="Flat"))
    assert needs(flat, 1, BATCH).index == flat.retrieval._rows.nbytes
    inverted = make(MiningConfig(backend="faiss", index="IVF2,SQ8", min_fill=0.5))
    codes = needs(inverted, 1, BATCH).index
    assert needs(make(MiningConfig(backend="exact")), 1, BATCH).index == 0
    room = 64  # a list may hold as much again, and the hash table
    assert ROWS * (6 + 8) < codes < ROWS * (2 * (6 + 8) + room)
    assert needs(inverted, 1, BATCH).traffic == 0
    assert needs(inverted, 7, BATCH).bank == -(-ROWS // 7) * (6 * 2 + 16)

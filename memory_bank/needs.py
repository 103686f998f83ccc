"""Compute what a bank needs on each of several processes: memory, and what its look-ups receive a step."""

from dataclasses import dataclass

from memory_bank.draw import examined_first
from memory_bank.miner import Miner
from memory_bank.sharded_search import expected_part

# A slot's row and step.
_SLOT = 16


@dataclass(frozen=True)
class Needs:
    """Bytes on one of ``ranks`` processes.

    Attributes:
        ranks: Number of processes that share the bank.
        bank: Keys, rows and steps of the slots.
        index: Index of the slots, estimated: FAISS keeps spare room in its lists.
        traffic: Bytes received in a step, from all processes and itself, for look-ups and the mined rows; at
            most, since a row that several queries share is sent once.
    """

    ranks: int
    bank: int
    index: int
    traffic: int


def needs(miner: Miner, ranks: int, global_batch: int) -> Needs:
    """Compute what the bank of ``miner`` needs if ``ranks`` processes share it (``bank.placement=sharded``).

    One process receives nothing; a replicated bank needs as much as one process on each.

    Args:
        miner: Any, built for any number of processes.
        ranks: Number of processes.
        global_batch: Queries of a step, over all processes.
    """
    bank = miner.bank
    rows = -(-bank.capacity // ranks)
    memory = rows * (_key_bytes(miner) + _SLOT)
    traffic = _received(miner, ranks, global_batch) if ranks > 1 else 0
    return Needs(ranks, memory, miner.retrieval.index_bytes(rows), traffic)


def _key_bytes(miner: Miner) -> int:
    return miner.bank.dim * miner.bank.key.element_size()


def _received(miner: Miner, ranks: int, batch: int) -> int:
    """Add up what sharded.py and sharded_search.py exchange for what the mining method declares."""
    every = miner.bank.capacity * (_key_bytes(miner) + 8 + 1) if miner.method.gathers_every_row else 0
    uniform = miner.config.num_uniform if "num_uniform" in miner.method.reads else 0
    drawn = _drawn(miner, ranks, uniform) + uniform * (8 + _key_bytes(miner))
    return every + drawn + (_looked_up(miner, ranks, batch) if miner.depth else 0)


def _looked_up(miner: Miner, ranks: int, batch: int) -> int:
    bank, mining, key = miner.bank, miner.config, _key_bytes(miner)
    own, query = -(-batch // ranks), 4 * bank.dim
    found = min(expected_part(miner.depth, ranks), -(-bank.capacity // ranks))  # of each query, on each rank
    hard = min(own * mining.num_hard, miner.retrieval.size or bank.capacity)
    if miner.retrieval.size is None:
        # Queries and ids of all; slots, similarities and two counts of each own query from each rank.
        look_up = batch * (query + 8 + 12 * found + 16)
    else:
        look_up = _drawn(miner, ranks, miner.retrieval.size) + miner.retrieval.size * (8 + key)
    if mining.query == "stored":
        # The stored queries; slots of all queries to all; then similarities of the fresh queries.
        look_up += own * (16 + key) + batch * (8 * miner.depth + 16 + query) + own * miner.depth * 20
    return look_up + hard * (8 + key)


def _drawn(miner: Miner, ranks: int, count: int) -> int:
    """Return the bytes of a draw: each rank sends its first ``count`` positions among those examined."""
    return 8 * min(ranks * count, examined_first(miner.bank.capacity, count))

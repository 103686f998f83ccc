"""Build a search with FAISS: flat, or of inverted lists, as ``mining.index`` and the number of rows ask."""

import math

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.retrieval.base import Retrieval, SearchSpec
from memory_bank.retrieval.flat import Flat
from memory_bank.retrieval.inverted import ROWS_PER_LIST
from memory_bank.retrieval.ivf import Ivf

# Most rows that are searched without lists; measured, see memory_bank/backend.py.
FLAT_ROWS = 65_536
# Most lists of an index that is chosen: the time of k-means grows with their square.
MOST_LISTS = 16_384
# Deepest rank for which a top-k is cheaper than a sample; also the limit of FAISS on a GPU.
REACH = 2048


def build_faiss(spec: SearchSpec) -> Retrieval:
    """Build the search that ``mining.index`` names; ``auto`` decides by rows.

    Raises:
        ValueError: a band deeper than a look-up can reach, or too few rows to train the lists.
    """
    config, bank = spec.config, spec.bank
    if spec.depth > reach(bank):
        raise ValueError(
            f"mining.backend=faiss: mining.band, skip_top and num_hard reach rank {spec.depth} of "
            f"{bank.capacity}, an index looks up {REACH}; "
            "use mining.backend=subsample or exact, or a shallower band"
        )
    factory = _index(config, bank) if config.index == "auto" else config.index
    if factory == "Flat":
        return spec.spread(Flat(spec.part, spec.reason))
    ivf = Ivf(
        spec.part,
        factory,
        nprobe=config.nprobe,
        min_recall=config.min_recall,
        seed=spec.seed,
        reason=spec.reason,
        whole=bank,
    )
    if bank.capacity * config.min_fill < ROWS_PER_LIST * ivf.nlist:
        raise ValueError(
            f"mining.index={factory!r} is trained on {ROWS_PER_LIST * ivf.nlist} rows or more, "
            f"mining.min_fill={config.min_fill:g} of {bank.capacity} slots are fewer; "
            "raise mining.min_fill or ask for fewer lists"
        )
    return spec.spread(ivf)


def reach(bank: Bank) -> int:
    """Return the deepest rank that a FAISS index may be asked for."""
    return max(REACH, bank.capacity // 8)


def wanted_lists(rows: int) -> int:
    """Return how many lists suit an inverted file: the power of two near 4 sqrt(n), at most MOST_LISTS."""
    return min(MOST_LISTS, 1 << round(math.log2(4 * math.sqrt(rows))))


def _index(config: MiningConfig, bank: Bank) -> str:
    """Return a factory string of scalar codes in about 4 sqrt(n) lists, a power of two up to MOST_LISTS."""
    if bank.capacity <= FLAT_ROWS:
        return "Flat"
    affordable = int(bank.capacity * config.min_fill) // ROWS_PER_LIST
    return f"IVF{min(wanted_lists(bank.capacity), 1 << max(0, affordable.bit_length() - 1))},SQ8"

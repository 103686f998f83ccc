"""Choose the search backend of a bank."""

import math
from collections.abc import Callable

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import MiningMethod, method_of
from memory_bank.policy import skip_top
from memory_bank.retrieval.base import Retrieval
from memory_bank.retrieval.exact import Exact, Subsample
from memory_bank.retrieval.flat import Flat
from memory_bank.retrieval.inverted import ROWS_PER_LIST
from memory_bank.retrieval.ivf import Ivf
from memory_bank.storage import Storage

# Measured on trained embeddings, 256 queries, one core of a CPU (benchmarks/bench_search.py): at 10,000 rows
# torch's product takes 16 ms and FAISS's 15; at 50,000 they take 85 and 43, an inverted file 16 at recall
# 0.98; at 200,000 these are 349, 138 and 23 ms. Most rows for which a CPU uses the first, and the second.
EXACT_ROWS_CPU = 16_384
FLAT_ROWS = 65_536
# Most rows that a GPU searches exactly for a deep band; above, it samples. A CPU samples from twice the
# sample's rows on.
EXACT_ROWS_GPU = 131_072
# Most lists of an index that is chosen: the time of k-means grows with their square.
MOST_LISTS = 16_384
# Deepest rank for which a top-k is cheaper than a sample; also the limit of FAISS on a GPU.
REACH = 2048


def choose(
    config: MiningConfig,
    bank: Bank,
    *,
    seed: int,
    method: MiningMethod | None = None,
    spread: Callable[[Retrieval], Retrieval] = lambda inner: inner,
) -> Retrieval:
    """Make the backend that ``config`` asks for; ``auto`` decides by rows, ranks needed and device.

    A bank on a GPU is searched by torch, not by FAISS's GPU build: its inverted files can neither remove nor
    replace a vector, and its flat search is the same product and top-k.

    Args:
        config: The settings.
        bank: What is searched; its size decides, not that of a process's part, so that the choice is the same
            for any number of processes.
        seed: Decides the training of an index.
        method: Says how deep a look-up must reach; None is the one that ``mining.method`` names.
        spread: Makes a search of the whole bank of a search of ``bank.local``.

    Raises:
        ValueError: a FAISS index for a band deeper than a look-up can reach, or for a filter it cannot serve.
    """
    method = method or method_of(config)
    needed = _needed(config, bank, method)

    def exact(reason: str = "") -> Retrieval:
        return spread(Exact(_part(bank), reason))

    if config.backend == "exact":
        return exact()
    if config.backend == "subsample":
        return Subsample(bank, sample_size(config), exact())
    if config.backend == "faiss":
        return spread(_faiss(config, bank, needed, seed))
    on_cpu = bank.device.type == "cpu"
    if is_sampled(config, bank, method):
        return Subsample(bank, sample_size(config), exact(), f" (auto: the band reaches rank {needed})")
    if not on_cpu:
        return exact(" (auto: the bank is on a GPU)")
    if bank.capacity <= EXACT_ROWS_CPU:
        return exact(f" (auto: {EXACT_ROWS_CPU} rows or fewer)")
    if needed > _reach(bank):
        return exact(f" (auto: the band reaches rank {needed})")
    return spread(_faiss(config, bank, needed, seed, f" (auto: more than {EXACT_ROWS_CPU} rows on a CPU)"))


def _part(bank: Bank) -> Storage:
    assert isinstance(bank.local, Storage)
    return bank.local


def is_sampled(config: MiningConfig, bank: Bank, method: MiningMethod) -> bool:
    """Return whether a sample of the bank is searched: as set, or with ``auto`` if the band is deep."""
    if config.backend != "auto":
        return config.backend == "subsample"
    sample = sample_size(config)
    large = max(2 * sample, 0 if bank.device.type == "cpu" else EXACT_ROWS_GPU)
    deep = _needed(config, bank, method) > REACH
    return deep and bank.capacity > large and config.false_negative != "attract"


def _faiss(config: MiningConfig, bank: Bank, needed: int, seed: int, reason: str = "") -> Retrieval:
    if needed > _reach(bank):
        raise ValueError(
            f"mining.backend=faiss: mining.band, skip_top and num_hard reach rank {needed} of "
            f"{bank.capacity}, an index looks up {REACH}; "
            "use mining.backend=subsample or exact, or a shallower band"
        )
    factory = _index(config, bank) if config.index == "auto" else config.index
    if factory == "Flat":
        return Flat(_part(bank), reason)
    ivf = Ivf(
        _part(bank),
        factory,
        nprobe=config.nprobe,
        min_recall=config.min_recall,
        seed=seed,
        reason=reason,
        whole=bank,
    )
    if bank.capacity * config.min_fill < ROWS_PER_LIST * ivf.nlist:
        raise ValueError(
            f"mining.index={factory!r} is trained on {ROWS_PER_LIST * ivf.nlist} rows or more, "
            f"mining.min_fill={config.min_fill:g} of {bank.capacity} slots are fewer; "
            "raise mining.min_fill or ask for fewer lists"
        )
    return ivf


def _index(config: MiningConfig, bank: Bank) -> str:
    """Return a factory string of scalar codes in about 4 sqrt(n) lists, a power of two up to MOST_LISTS."""
    if bank.capacity <= FLAT_ROWS:
        return "Flat"
    affordable = int(bank.capacity * config.min_fill) // ROWS_PER_LIST
    return f"IVF{min(wanted_lists(bank.capacity), 1 << max(0, affordable.bit_length() - 1))},SQ8"


def _reach(bank: Bank) -> int:
    """Return the deepest rank that a FAISS index may be asked for."""
    return max(REACH, bank.capacity // 8)


def _needed(config: MiningConfig, bank: Bank, method: MiningMethod) -> int:
    # A method without look-ups leaves only galleries of a few neighbours to search for.
    return method.depth(config, bank.capacity) if method.looks_up else 1


def sample_size(config: MiningConfig) -> int:
    """Return a sample size whose narrowest band holds ``num_hard`` rows, so that sampling is the draw."""
    bands = [config.band] if config.band_end is None else [config.band, config.band_end]
    width = min(min(high, 1 - skip_top(config)) - low for low, high in bands)
    return max(config.sample, math.ceil(config.num_hard / max(width, 1e-6)))


def wanted_lists(rows: int) -> int:
    """Return how many lists suit an inverted file: the power of two near 4 sqrt(n), at most MOST_LISTS."""
    return min(MOST_LISTS, 1 << round(math.log2(4 * math.sqrt(rows))))

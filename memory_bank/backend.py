"""Choose the search backend of a bank, by its size and device and the depth of the band."""

import math
from collections.abc import Callable
from dataclasses import replace

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import MiningMethod, method_of
from memory_bank.policy import skip_top
from memory_bank.registry import BACKENDS
from memory_bank.retrieval.base import Retrieval, SearchSpec
from memory_bank.retrieval.faiss_search import REACH, reach

# Measured on trained embeddings, 256 queries, one core of a CPU (benchmarks/bench_search.py): at 10,000 rows
# torch's product takes 16 ms and FAISS's 15; at 50,000 they take 85 and 43, an inverted file 16 at recall
# 0.98; at 200,000 these are 349, 138 and 23 ms. Most rows for which a CPU uses the first; FLAT_ROWS of
# retrieval/faiss_search.py for the second.
EXACT_ROWS_CPU = 16_384
# Least rows for each rank looked up with which a CPU uses FAISS. It scores what it finds again by the stored
# keys: 128 queries and 2,002 ranks of 20,000 rows take it 200 ms and torch's product 51, of 50,000 rows 216
# and 117; 512 ranks take 53 and 45, and 64 and 80; 64 ranks 16 and 23, and 34 and 55.
ROWS_PER_RANK_CPU = 32
# Most rows that a GPU searches exactly for a deep band; above, it samples. A CPU samples from twice the
# sample's rows on.
EXACT_ROWS_GPU = 131_072


def choose_backend(
    config: MiningConfig,
    bank: Bank,
    *,
    seed: int,
    method: MiningMethod | None = None,
    spread: Callable[[Retrieval], Retrieval] = lambda inner: inner,
) -> Retrieval:
    """Make the backend that ``config`` asks for; ``auto`` decides by rows, ranks needed and device.

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
    # A method without look-ups leaves only galleries of a few neighbours to search for.
    depth = max(1, method.depth(config, bank.capacity))
    spec = SearchSpec(bank, config, depth, _sample_size(config), seed, spread)
    name, reason = _chosen(spec) if config.backend == "auto" else (config.backend, "")
    retrieval: Retrieval = BACKENDS[name](replace(spec, reason=reason))
    return retrieval


def _chosen(spec: SearchSpec) -> tuple[str, str]:
    """Return the backend that suits a bank, and why.

    A bank on a GPU is searched by torch, not by FAISS's GPU build: its inverted files can neither remove nor
    replace a vector, and its flat search is the same product and top-k.
    """
    rows, on_cpu = spec.bank.capacity, spec.bank.device.type == "cpu"
    large = max(2 * spec.sample, 0 if on_cpu else EXACT_ROWS_GPU)
    if spec.depth > REACH and rows > large and spec.config.false_negative != "attract":
        return "subsample", f" (auto: the band reaches rank {spec.depth})"
    if not on_cpu:
        return "exact", " (auto: the bank is on a GPU)"
    if rows <= EXACT_ROWS_CPU:
        return "exact", f" (auto: {EXACT_ROWS_CPU} rows or fewer)"
    if spec.depth > min(reach(spec.bank), rows // ROWS_PER_RANK_CPU):
        return "exact", f" (auto: the band reaches rank {spec.depth})"
    return "faiss", f" (auto: more than {EXACT_ROWS_CPU} rows on a CPU)"


def _sample_size(config: MiningConfig) -> int:
    """Return a sample size whose narrowest band holds ``num_hard`` rows, so that sampling is the draw."""
    bands = [config.band] if config.band_end is None else [config.band, config.band_end]
    width = min(min(high, 1 - skip_top(config)) - low for low, high in bands)
    return max(config.sample, math.ceil(config.num_hard / max(width, 1e-6)))

"""Find the largest values of each row fast, also for the thousands of ranks that a band may need; count."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

# For k above one value in so many, torch's topk on a CPU selects and sorts; below, it keeps a fast heap.
_MANY = 64
# Values that are processed at a time: their keys stay in the cache, 512 KiB.
_BLOCK = 1 << 16
# Number of values from which threads pay off.
_LARGE = 1 << 18
# Low bits of a 64-bit key that hold a value's position.
_POSITION = (1 << 28) - 1
_LEAST, _MOST = np.finfo(np.float32).min, np.finfo(np.float32).max


def largest(values: Tensor, k: int) -> tuple[Tensor, Int[Tensor, "..."]]:
    """Return the ``k`` largest values along the last axis and their positions; ties in any order.

    On a CPU and for large k, NumPy selects and sorts with vector instructions: 2,458 of 16,384 values in 256
    rows take 14 ms on one core, torch 31 ms on two; 768 of 5,120 in as many rows take 4 ms, torch 9.

    Args:
        values: float32 or int64, one or two axes. A nan counts as the largest value in torch's way and as
            the least in NumPy's. The last 28 bits of int64 may be ignored.
        k: At most the length of the last axis, which is at most 2^28.
    """
    if values.device.type != "cpu" or k * _MANY <= values.shape[-1]:
        top = values.topk(k)
        return top.values, top.indices
    rows = values.reshape(-1, values.shape[-1]).numpy()
    # Half the cores: on the others, torch's threads spin while they wait for their next operation.
    threads = min(torch.get_num_threads() // 2, len(rows)) if rows.size >= _LARGE else 1
    if threads <= 1:
        taken, positions = _select(rows, k)
    else:
        parts = _pool(threads, os.getpid()).map(_select, np.array_split(rows, threads), [k] * threads)
        taken, positions = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = (*values.shape[:-1], k)
    return torch.from_numpy(taken).view(shape), torch.from_numpy(positions).view(shape)


def count(flags: Bool[Tensor, "b c"]) -> Int[Tensor, " b"]:
    """Count the set flags of each row; a sum in int64 widens all flags first, five times slower on a CPU."""
    return flags.sum(1, dtype=torch.int32).long()


def _select(rows: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Select by keys that hold value and position in one number, so that no gather is needed afterwards.

    A float32 leaves 29 bits of a float64 free; an infinity does not, so the largest finite values replace it.
    """
    length, floats = rows.shape[1], rows.dtype == np.float32
    block, last, columns = max(1, _BLOCK // length), length - k, np.arange(length)
    taken, positions = np.empty((len(rows), k), rows.dtype), np.empty((len(rows), k), np.int64)
    scratch = np.empty((min(block, len(rows)), length), np.float64 if floats else np.int64)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        keys = scratch[: len(rows[part])]
        if floats:
            np.fmax(rows[part], _LEAST, out=keys)
            np.fmin(keys, _MOST, out=keys)
        else:
            np.bitwise_and(rows[part], ~_POSITION, out=keys)
        np.bitwise_or(keys.view(np.int64), columns, out=keys.view(np.int64))
        keys.partition(last, axis=1)
        ordered = np.sort(keys[:, last:], axis=1)[:, ::-1]
        taken[part] = ordered if floats else ordered & ~_POSITION
        np.bitwise_and(ordered.view(np.int64), _POSITION, out=positions[part])
    if floats:
        taken[taken == _LEAST], taken[taken == _MOST] = -np.inf, np.inf
    return taken, positions


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Keep the pool: starting one takes as long as a selection. A forked process needs a new one."""
    return ThreadPoolExecutor(threads, thread_name_prefix="largest")

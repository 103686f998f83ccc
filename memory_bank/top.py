"""The largest values of each row, for the thousands of ranks that a band of hardness may need; counts."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

# Above one value in so many torch's topk on a CPU selects and sorts, below it keeps a heap, which is fast.
_MANY = 64
# Values of the rows that are looked at together: their keys stay in the cache, 512 KiB.
_BLOCK = 1 << 16
# Values from which threads pay.
_LARGE = 1 << 18
# Low bits of a 64-bit key that carry a value's place.
_PLACE = (1 << 28) - 1
_LEAST, _MOST = np.finfo(np.float32).min, np.finfo(np.float32).max


def largest(values: Tensor, k: int) -> tuple[Tensor, Int[Tensor, "..."]]:
    """The ``k`` largest values along the last axis and their places, as ``topk``; ties in any order.

    On a CPU, where k is many, NumPy selects and sorts with vector instructions: 2,458 of 16,384 in 256 rows
    take one core 14 ms where torch takes two 31, 768 of 5,120 in as many 4 against 9.

    Args:
        values: float32 or int64, one or two axes. A nan is torch's largest number and NumPy's least, here. Of
            int64 the last 28 bits may not count.
        k: At most the length of the last axis, which is at most 2^28.
    """
    if values.device.type != "cpu" or k * _MANY <= values.shape[-1]:
        found = values.topk(k)
        return found.values, found.indices
    rows = values.reshape(-1, values.shape[-1]).numpy()
    # Half the cores: on the others torch's threads wait for their next operation without sleeping.
    threads = min(torch.get_num_threads() // 2, len(rows)) if rows.size >= _LARGE else 1
    if threads <= 1:
        taken, place = _select(rows, k)
    else:
        parts = _pool(threads, os.getpid()).map(_select, np.array_split(rows, threads), [k] * threads)
        taken, place = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = (*values.shape[:-1], k)
    return torch.from_numpy(taken).view(shape), torch.from_numpy(place).view(shape)


def count(flags: Bool[Tensor, "b c"]) -> Int[Tensor, " b"]:
    """How many a row; a sum in int64 would widen all of them first, which takes a CPU five times as long."""
    return flags.sum(1, dtype=torch.int32).long()


def _select(rows: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """By keys that hold value and place in one number, so that nothing is looked up afterwards.

    A float32 leaves 29 bits of a float64 free; an infinity has none, so the outermost numbers stand for it.
    """
    length, floats = rows.shape[1], rows.dtype == np.float32
    block, last, columns = max(1, _BLOCK // length), length - k, np.arange(length)
    taken, place = np.empty((len(rows), k), rows.dtype), np.empty((len(rows), k), np.int64)
    scratch = np.empty((min(block, len(rows)), length), np.float64 if floats else np.int64)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        keys = scratch[: len(rows[part])]
        if floats:
            np.fmax(rows[part], _LEAST, out=keys)
            np.fmin(keys, _MOST, out=keys)
        else:
            np.bitwise_and(rows[part], ~_PLACE, out=keys)
        np.bitwise_or(keys.view(np.int64), columns, out=keys.view(np.int64))
        keys.partition(last, axis=1)
        found = np.sort(keys[:, last:], axis=1)[:, ::-1]
        taken[part] = found if floats else found & ~_PLACE
        np.bitwise_and(found.view(np.int64), _PLACE, out=place[part])
    if floats:
        taken[taken == _LEAST], taken[taken == _MOST] = -np.inf, np.inf
    return taken, place


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept, as starting it takes as long as a selection; a forked process, where it is dead, makes one."""
    return ThreadPoolExecutor(threads, thread_name_prefix="largest")

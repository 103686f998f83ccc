"""The largest values of each row, for the thousands of ranks that a band of hardness may need."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_bank.shapes import Int

# Above one value in so many torch's topk on a CPU selects and sorts, below it keeps a heap, which is fast.
_MANY = 64
# Values from which threads pay.
_LARGE = 1 << 18


def largest(values: Tensor, k: int) -> tuple[Tensor, Int[Tensor, "..."]]:
    """The ``k`` largest values along the last axis and their places, as ``topk``; ties in any order.

    On a CPU, where k is many, NumPy selects and sorts with vector instructions: 2,458 of 16,384 in 256 rows
    take 20 ms of one core against torch's 57, 768 of 5,120 in as many 4 against 17.

    Args:
        values: float32 or int64, one or two axes.
        k: At most the length of the last axis.
    """
    if values.device.type != "cpu" or k * _MANY <= values.shape[-1]:
        found = values.topk(k)
        return found.values, found.indices
    last = values.shape[-1] - k
    # The smallest of the largest comes first, and the rest in any order.
    place = _by_rows(lambda rows: np.argpartition(rows, last, axis=-1), values)[..., last:]
    order = _by_rows(lambda rows: np.argsort(rows, axis=-1), values.gather(-1, place)).flip(-1)
    place = place.gather(-1, order)
    return values.gather(-1, place), place


def _by_rows(function: Callable[[NDArray[Any]], NDArray[np.int64]], values: Tensor) -> Int[Tensor, "..."]:
    """``function`` of the values, by threads where there are many: NumPy gives the interpreter away."""
    threads = min(torch.get_num_threads(), len(values)) if values.numel() >= _LARGE else 1
    if threads == 1 or values.ndim == 1:
        return torch.from_numpy(function(values.numpy()))
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(function, np.array_split(values.numpy(), threads)))
    return torch.from_numpy(np.concatenate(parts))

"""Permute any number of elements as a pure function of (seed, epoch)."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memory_bank.draw import mix, permuted

MOST_SORTED = 2**22
"""Elements up to which a permutation is sorted and kept, 8 bytes each; beyond, each one is computed alone."""


def permute(position: Int[Tensor, " m"], count: int, seed: int, epoch: int) -> Int[Tensor, " m"]:
    """Return the element at each position of the permutation of [0, count) of (seed, epoch).

    Args:
        position: int64, in [0, count).
        count: Elements, 1 or more.
        seed: In [0, 2**32).
        epoch: 0 or more.
    """
    if epoch < 0:
        raise ValueError(f"epoch={epoch}: 0 or more is needed")
    if count > MOST_SORTED:
        return permuted(position, count, mix(seed, epoch))
    return torch.from_numpy(_sorted(count, seed, epoch)[position.numpy()])


# Several epochs are kept: decoding and the miner look ahead into the next epoch.
@lru_cache(maxsize=4)
def _sorted(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Sort the elements by one random 64-bit word each.

    NumPy keeps the raw words of a bit generator the same in all versions, those of ``Generator.permutation``
    only within one (NEP 19); so a resume under another NumPy sees the same order. Equal words (about 1e-7
    likely at a million elements) are ordered by element.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)

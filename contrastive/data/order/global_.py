"""``data.order=global``: a fresh permutation of all rows in each epoch."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from contrastive.config import PretrainConfig
from contrastive.data.images import Images
from contrastive.data.order.base import Order


@dataclass(frozen=True)
class GlobalOrder(Order):
    """A permutation of all rows that depends on (seed, epoch).

    Attributes:
        rows: Images of the training set.
        seed: In [0, 2**32).
    """

    rows: int
    seed: int

    @override
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        return torch.from_numpy(_permutation(self.rows, self.seed, epoch)[start:stop].copy())


def build(images: Images, config: PretrainConfig) -> GlobalOrder:
    """Build the order of a run."""
    return GlobalOrder(len(images), config.run.seed)


# Several epochs are kept: decoding and the miner look ahead into the next epoch.
@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Sort the rows by one random 64-bit word each.

    NumPy keeps the raw words of a bit generator the same in all versions, those of ``Generator.permutation``
    only within one (NEP 19); so a resume under another NumPy sees the same order. Equal words (about 1e-7
    likely at a million rows) are ordered by row.
    """
    if epoch < 0:
        raise ValueError(f"epoch={epoch}: 0 or more is needed")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order

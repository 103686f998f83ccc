"""``data.order=global``: a fresh permutation of all rows in each epoch."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from contrastive.config import PretrainConfig
from contrastive.data.images import Images
from contrastive.data.order.base import Order
from contrastive.data.order.permutation import permute


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
        return permute(torch.arange(start, min(stop, self.rows)), self.rows, self.seed, epoch)


def build(images: Images, config: PretrainConfig) -> GlobalOrder:
    """Build the order of a run."""
    return GlobalOrder(len(images), config.run.seed)

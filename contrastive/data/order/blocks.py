"""``data.order=blocks``: neighbouring rows together, so that shards are read in few long pieces."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from contrastive.config import PretrainConfig, UserError
from contrastive.data.images import Images
from contrastive.data.order.base import Order
from contrastive.data.order.permutation import permute
from memory_bank.draw import mix

_SHIFT = 1  # sets the draw of the shift apart from that of the permutation


@dataclass(frozen=True)
class BlockOrder(Order):
    """Blocks of neighbouring rows in random order, read ``interleave`` at a time, a row of each in turn.

    So a batch of g images has g / interleave neighbours from each of ``interleave`` blocks. Blocks begin at
    another row in each epoch, and go round from the last row to the first: neighbours at the edge of a block
    differ, and so do the rows at the end of an epoch that fill no batch.

    Attributes:
        rows: Images of the training set, at least ``block * interleave``.
        seed: In [0, 2**32).
        block: Rows of a block.
        interleave: Blocks that are read at the same time.
    """

    rows: int
    seed: int
    block: int
    interleave: int

    @override
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        position = torch.arange(start, min(stop, self.rows))
        blocks = self.rows // self.block
        # Rows that fill no block come last, in place; there is at most one block's worth less one.
        whole = position < blocks * self.block
        window, inside = position[whole] // self._window, position[whole] % self._window
        width = (blocks - window * self.interleave).clamp_max(
            self.interleave
        )  # the last window may be narrow
        block = permute(window * self.interleave + inside % width, blocks, self.seed, epoch)
        position[whole] = block * self.block + inside // width
        return (position + mix(self.seed, epoch, _SHIFT) % self.rows) % self.rows

    @property
    def _window(self) -> int:
        return self.block * self.interleave


def build(images: Images, config: PretrainConfig) -> BlockOrder:
    """Build the order of a run.

    Raises:
        UserError: fewer rows than the blocks that are read at the same time.
    """
    rows, blocks = len(images), config.data.blocks
    if rows < blocks.rows * blocks.interleave:
        raise UserError(
            f"data.order=blocks: {rows} images are fewer than data.blocks.rows={blocks.rows} x "
            f"data.blocks.interleave={blocks.interleave}, so epochs would hardly differ; lower one of them, "
            "or use data.order=global"
        )
    return BlockOrder(rows, config.run.seed, blocks.rows, blocks.interleave)

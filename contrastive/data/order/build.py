"""Build the order that ``data.order`` names."""

import torch

from contrastive.config import PretrainConfig, UserError
from contrastive.data.images import Images
from contrastive.data.order.base import Order
from contrastive.find_part import find_part
from contrastive.registry import ORDERS

_CHECKED_ROWS = 2**20  # the check takes memory and time proportional to the rows


def build_order(config: PretrainConfig, images: Images) -> Order:
    """Build an order, and check that its first epoch holds each row once.

    Args:
        config: The run; ``data.order`` is a name in the registry.
        images: The training set.

    Raises:
        UserError: unknown name, or rows that are missing, repeated or out of range.
    """
    name = config.data.order
    order: Order = find_part("data.order", ORDERS, name)(images, config)
    rows = len(images)
    if rows <= _CHECKED_ROWS:
        ids = order.ids(0, 0, rows)
        if ids.dtype != torch.int64 or not torch.equal(ids.sort().values, torch.arange(rows)):
            raise UserError(
                f"data.order={name}: epoch 0 does not hold each of the {rows} rows once, as int64; correct "
                f"its ids(epoch, start, stop), or use data.order=global"
            )
    return order

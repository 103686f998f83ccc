import numpy as np
import pytest
import torch

from contrastive.config import DataConfig, PretrainConfig, RunConfig, UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.order.base import Order
from contrastive.data.order.build import build_order
from contrastive.data.order.global_ import GlobalOrder
from contrastive.registry import ORDERS


def config(order="wrong", seed=3):
    return PretrainConfig(RunConfig(seed=seed), DataConfig(order=order))


def images(rows=6):
    return ArrayImages("set", [np.zeros((rows, 2, 2, 3), dtype=np.uint8)], 2)


class Twice(Order):
    """Show half of the rows, each twice."""

    def ids(self, epoch, start, stop):
        return torch.arange(start, stop) // 2


class Short(Order):
    def ids(self, epoch, start, stop):
        return torch.arange(start, stop, dtype=torch.int32)


def test_global_is_the_permutation_by_the_seed():
    assert build_order(config("global"), images()) == GlobalOrder(6, 3)


def test_an_unknown_order_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"data.order='globl': unknown; did you mean 'global'"):
        build_order(config("globl"), images())


@pytest.mark.parametrize("wrong", [Twice, Short])
def test_an_order_that_repeats_rows_or_has_other_numbers_is_refused(wrong, monkeypatch):
    monkeypatch.setitem(ORDERS, "wrong", f"{__name__}:make_{wrong.__name__.lower()}")
    with pytest.raises(UserError, match=r"data.order=wrong: epoch 0 does not hold each of the 6 rows once"):
        build_order(config(), images())


def make_twice(images, config):
    return Twice()


def make_short(images, config):
    return Short()

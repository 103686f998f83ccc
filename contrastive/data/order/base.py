"""The interface of ``data.order``: which row is visited when."""

from abc import ABC, abstractmethod

from jaxtyping import Int
from torch import Tensor


class Order(ABC):
    """The order in which an epoch visits the rows of the data set.

    An epoch has one position for each row, from 0. The row at a position is a pure function of the order's
    constructor arguments and the epoch, so that a resume, another rank and another world size get the same
    rows. ``ids`` is called for one optimizer step at a time, so an order may be computed in constant memory.
    """

    @abstractmethod
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        """Return the rows at positions ``start`` to ``stop``, exclusive, of ``epoch``, int64.

        The caller may write to the result.
        """

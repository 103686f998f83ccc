"""The interface of an order."""

from abc import ABC, abstractmethod

from jaxtyping import Int
from torch import Tensor


class Order(ABC):
    """Which row stands at which position of an epoch.

    The positions of an epoch are 0 to the number of rows, exclusive, and each row stands at one of them. The
    order is a pure function of what it was built from and of the epoch: a resume, another rank and another
    world size ask again and get the same rows. It is asked for one optimizer step at a time, so it may be
    computed in constant memory.
    """

    @abstractmethod
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        """Return the rows at positions ``start`` to ``stop``, exclusive, of ``epoch``, int64.

        The caller may write to the result.
        """

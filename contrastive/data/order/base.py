"""The interface of ``data.order``: which row is visited when."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override


class Order(ABC):
    """The order in which an epoch visits the rows of the data set.

    An epoch has one position for each row, from 0. The row at a position is a pure function of the order's
    constructor arguments and the epoch, so that a resume, another rank and another world size get the same
    rows. ``ids`` is called for one optimizer step at a time, so an order may be computed in constant memory.

    Attributes:
        reads: Settings of ``mining`` that it reads (``mining.class_prior``); training warns of those that are
            set, and that nothing reads.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        """Return the rows at positions ``start`` to ``stop``, exclusive, of ``epoch``, int64.

        The caller may write to the result.
        """


class BankOrder(Order):
    """An order that composes each epoch from the bank's keys at the end of the epoch before.

    The module calls ``compose`` on rank 0 and ``adopt`` with the result on all ranks, and saves what was
    adopted with the checkpoint. Nothing may ask for an epoch before it is adopted (``Plan.known_until``).

    Args:
        first: Order of an epoch that was not adopted: the first one, and the rest of an epoch that is resumed
            after files were added or removed.
    """

    def __init__(self, first: Order) -> None:
        self._first = first
        self._adopted: dict[int, Tensor] = {}

    @abstractmethod
    def compose(self, epoch: int, keys: Float[Tensor, "n d"], known: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return all rows in the order of ``epoch``, int64 on the CPU: a pure function of its arguments.

        Args:
            epoch: From 1.
            keys: Unit row of each data set row, in the bank's dtype and on its device.
            known: Rows that have a key.
        """

    @override
    def ids(self, epoch: int, start: int, stop: int) -> Int[Tensor, " n"]:
        if epoch in self._adopted:
            return self._adopted[epoch][start:stop].clone()
        return self._first.ids(epoch, start, stop)

    def adopt(self, epoch: int, ids: Int[Tensor, " n"]) -> None:
        """Visit ``epoch`` in the order of ``ids``; the epoch before is kept, older ones are dropped."""
        self._adopted = {at: kept for at, kept in self._adopted.items() if at >= epoch - 1} | {epoch: ids}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the orders adopted for the last two epochs."""
        return {str(epoch): ids for epoch, ids in self._adopted.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        self._adopted = {int(epoch): ids.cpu() for epoch, ids in state.items()}

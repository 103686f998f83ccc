"""Define how the processes that share a bank communicate."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Exchange(Protocol):
    """Communication between the processes that share a bank. All methods are collective.

    With ``mining.overlap`` the main thread and the look-ahead thread use it at the same time: the calls of
    each are in the same order on all ranks, but not those of both together.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102 - see the class
    @property
    def world(self) -> int: ...  # noqa: D102 - see the class

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Return each rank's ``rows``, by rank; their number may differ, shape and dtype of a row may not."""

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; return the part that each rank sent to this one, by rank."""

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of integer ``values`` of one shape."""

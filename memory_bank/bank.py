"""What a bank is to the miner, its metrics and its searches, wherever its slots are kept."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Bank(ABC):
    """Slots, each with a key, the id of the row it is of, and the step that wrote it; -1 is no slot.

    ``storage.py`` keeps all of them in this process, ``sharded.py`` some of them: there, ``key``, ``id``,
    ``written_at``, ``refused``, ``admissible`` and ``ages_of`` speak of this process's slots alone, and what
    asks the other processes is collective.

    Attributes:
        kind: ``dataset`` or ``queue``.
        capacity: Number of slots n.
        dim: Embedding dimension d.
        max_age: Optimizer steps after which a key is no longer admissible; None keeps all.
        refused: Rows refused so far because a value was not finite; int64 scalar tensor.
    """

    kind: str
    capacity: int
    dim: int
    max_age: int | None
    refused: Tensor

    @property
    @abstractmethod
    def key(self) -> Float[Tensor, "n d"]:
        """Stored keys, in the storage dtype; zero where nothing was written."""

    @property
    @abstractmethod
    def id(self) -> Int[Tensor, " n"]:
        """Dataset row of each slot, -1 where nothing was written."""

    @property
    @abstractmethod
    def written_at(self) -> Int[Tensor, " n"]:
        """Optimizer step that wrote each slot, -1 where nothing was written."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the slots live."""

    @property
    def local(self) -> "Bank":
        """The slots of this process as a bank of their own, to be read without the other processes."""
        return self

    @abstractmethod
    def fill(self) -> Float[Tensor, ""]:
        """Share of the slots that hold a key."""

    @abstractmethod
    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        """Slots that hold a key not older than ``max_age`` steps, seen from ``step``."""

    @abstractmethod
    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        """How many slots are admissible."""

    @abstractmethod
    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """Up to ``count`` different admissible slots, uniformly, -1 where there are fewer (draw_slots)."""

    @abstractmethod
    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Stored keys of ``slots`` as float32; zero for -1."""

    @abstractmethod
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Dataset rows of ``slots``; -1 for -1 and for empty ones."""

    @abstractmethod
    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Optimizer steps since ``slots`` were written; nan for -1 and for empty ones."""

    @abstractmethod
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The slot that holds each id's key, -1 where there is none."""

    @abstractmethod
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """How many admissible slots are each query's own."""

    @abstractmethod
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        """``admissible`` less the slots of ``ids``."""

    @abstractmethod
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store unit rows ``keys`` of ``ids``, made in optimizer step ``step``; see Storage.write.

        Returns:
            The slot of each row, -1 where it is not kept.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; the tensors may be the bank's own, not copies."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved bank.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """

    def require_fit(self, state: dict[str, Any]) -> None:
        """Raise ValueError if ``state`` is of another kind, capacity, dimension or dtype."""
        given = (state["kind"], tuple(state["key"].shape), state["key"].dtype)
        wanted = (self.kind, (self.capacity, self.dim), self.key.dtype)
        if given != wanted:
            raise ValueError(
                f"saved bank is {given[0]} {given[1]} {given[2]}, "
                f"this one is {wanted[0]} {wanted[1]} {wanted[2]}; keep the bank's settings, "
                "the data and encoder.projector_dim as they were, or start a new run"
            )

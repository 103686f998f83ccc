"""Define the interface of a bank: what the miner, its metrics and the search backends use of it."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Bank(ABC):
    """Keep keys in slots, each with its dataset row and the step that wrote it; slot -1 means none.

    ``storage.py`` keeps all slots in this process. ``sharded.py`` keeps a part of them: there, ``key``,
    ``id``, ``written_at``, ``refused``, ``admissible`` and ``ages_of`` cover this process's slots alone, and
    methods that need the other processes are collective.

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
        """Device of the slots."""

    @property
    def local(self) -> "Bank":
        """Return the slots of this process as a bank of their own, to be read without the other processes."""
        return self

    @abstractmethod
    def fill(self) -> Float[Tensor, ""]:
        """Return the share of slots that hold a key."""

    @abstractmethod
    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        """Return a mask of the slots whose key is not older than ``max_age`` steps at ``step``."""

    @abstractmethod
    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        """Count the admissible slots."""

    @abstractmethod
    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """Draw up to ``count`` distinct admissible slots uniformly, -1 where there are fewer (draw_slots)."""

    @abstractmethod
    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Return the stored keys of ``slots`` as float32; zero for -1."""

    @abstractmethod
    def score(
        self, query: Float[Tensor, "b d"], slots: Int[Tensor, "b c"], admissible: Bool[Tensor, " n"]
    ) -> Float[Tensor, "b c"]:
        """Return each query's inner products with the keys of its slots; -inf where not admissible, or -1."""

    @abstractmethod
    def every_row(
        self, admissible: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"], Bool[Tensor, " m"]]:
        """Return float32 keys, dataset rows and ``admissible`` of all ``capacity`` slots."""

    @abstractmethod
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the dataset rows of ``slots``; -1 for -1 and for empty ones."""

    @abstractmethod
    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Return the optimizer steps since ``slots`` were written; nan for -1 and for empty ones."""

    @abstractmethod
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return the slot of each id's newest key, -1 where there is none."""

    @abstractmethod
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Count the admissible slots that hold each query's own row."""

    @abstractmethod
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        """Return ``admissible`` without the slots of ``ids``."""

    @abstractmethod
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store the unit rows ``keys`` of ``ids``, computed in optimizer step ``step``; see Storage.write.

        Returns:
            The slot of each row, -1 where it was not stored.
        """

    def total(self, values: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the sum of ``values`` over the processes that share this bank."""
        return values

    def share(self, values: Int[Tensor, " g"]) -> Int[Tensor, " b"]:
        """Return this process's part of ``values``, which all processes that share this bank have."""
        return values

    def joined(self, values: Int[Tensor, "b ..."]) -> Int[Tensor, "g ..."]:
        """Return the ``values`` of all processes that share this bank, in the order of ``share``."""
        return values

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all state that later steps depend on; tensors may be the bank's own, not copies."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved bank.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """

    def require_fit(self, state: dict[str, Any]) -> None:
        """Raise ValueError if ``state`` is of another kind, capacity, dimension or dtype."""
        saved = (state["kind"], tuple(state["key"].shape), state["key"].dtype)
        expected = (self.kind, (self.capacity, self.dim), self.key.dtype)
        if saved != expected:
            raise ValueError(
                f"saved bank is {saved[0]} {saved[1]} {saved[2]}, "
                f"this one is {expected[0]} {expected[1]} {expected[2]}; keep the bank's settings, "
                "the data and encoder.projector_dim as they were, or start a new run"
            )

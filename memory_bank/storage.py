"""Where embeddings are kept: one slot per dataset row, or a FIFO queue.

The raw tensors here are the truth. Every index is derived from the *stored* values, rounded to the
storage dtype, so that search, loss and checkpoint speak of the same vectors.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.config import BankConfig
from memory_bank.draw import draw_slots

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Storage(Bank):
    """A bank that is whole in this process.

    Nothing here waits for the device: a refused row goes to a spare last slot, which stays empty. That
    slot is also what -1 indexes, so a missing slot reads as a zero key of id -1, never as someone's row.
    """

    def __init__(
        self, capacity: int, dim: int, *, dtype: torch.dtype, device: torch.device, max_age: int | None
    ) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"a bank of {capacity} slots of dimension {dim}: 1 or more of each is needed")
        self.capacity, self.dim, self.max_age = capacity, dim, max_age
        self._key = torch.zeros(capacity + 1, dim, dtype=dtype, device=device)
        self._id = torch.full((capacity + 1,), -1, dtype=torch.int64, device=device)
        self._written_at = torch.full((capacity + 1,), -1, dtype=torch.int64, device=device)
        self.refused = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def key(self) -> Float[Tensor, "n d"]:
        """Stored keys, in the storage dtype; zero where nothing was written."""
        return self._key[:-1]

    @property
    def id(self) -> Int[Tensor, " n"]:
        """Dataset row of each slot, -1 where nothing was written."""
        return self._id[:-1]

    @property
    def written_at(self) -> Int[Tensor, " n"]:
        """Optimizer step that wrote each slot, -1 where nothing was written."""
        return self._written_at[:-1]

    @property
    def device(self) -> torch.device:
        """Where the slots live."""
        return self._key.device

    def fill(self) -> Float[Tensor, ""]:
        """Share of the slots that hold a key."""
        return (self.id >= 0).float().mean()

    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        """Slots that hold a key not older than ``max_age`` steps, seen from ``step``."""
        # One comparison for both, as empty slots were written at -1: every step looks through all of them.
        return self.written_at >= (0 if self.max_age is None else max(0, step - self.max_age))

    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        """How many slots are admissible."""
        return admissible.sum()

    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """Up to ``count`` different admissible slots, uniformly, -1 where there are fewer (draw_slots)."""
        return draw_slots(admissible, count, key)

    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Stored keys of ``slots`` as float32; zero for -1."""
        rows = torch.where(slots < 0, self.capacity, slots).flatten()
        return self._key.index_select(0, rows).float().view(*slots.shape, self.dim)

    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Dataset rows of ``slots``; -1 for -1 and for empty ones."""
        return self._id[slots]

    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Optimizer steps since ``slots`` were written; nan for -1 and for empty ones."""
        return (step - self._written_at[slots]).float().masked_fill(self._id[slots] < 0, torch.nan)

    @torch.no_grad()
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store ``keys`` (unit rows, taken as they are).

        Args:
            keys: Any float dtype, any device. A row that is not finite in the storage dtype is refused
                and counted; the slot it was meant for keeps what it holds.
            ids: Their dataset rows. Where an id comes twice, the last finite row of a dataset bank wins.
            step: The optimizer step that made them.

        Returns:
            The slot of each row, -1 where it was refused or pushed out by the same write; ids that come
            twice name the same slot twice.

        Raises:
            ValueError: shapes that do not fit the bank, or (seen on the CPU only) ids outside it.
        """
        if keys.ndim != 2 or keys.shape[1] != self.dim or ids.shape != keys.shape[:1]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and ids {tuple(ids.shape)}: (g, {self.dim}) and (g,) are needed"
            )
        self._check_ids(ids)
        rounded = keys.detach().to(self.device, self._key.dtype)
        ids = ids.to(self.device)
        finite = rounded.isfinite().all(1)
        slots = torch.where(finite, self._place(ids, finite), self.capacity)
        slots = torch.where(slots < 0, self.capacity, slots)
        source = _last_equal(slots)
        self._key[slots] = rounded[source]
        self._id[slots] = ids[source]
        self._written_at.index_fill_(0, slots, step)
        self._clear_spare()
        self.refused += (~finite).sum()
        return torch.where(slots == self.capacity, -1, slots)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; the tensors are the bank's own, not copies."""
        return {
            "kind": self.kind,
            "key": self.key,
            "id": self.id,
            "written_at": self.written_at,
            "refused": self.refused,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved bank.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """
        self.require_fit(state)
        self.key.copy_(state["key"])
        self.id.copy_(state["id"])
        self.written_at.copy_(state["written_at"])
        self.refused.copy_(state["refused"])

    def _clear_spare(self) -> None:
        # Filled, not assigned: a number that is assigned is copied from the host, which waits.
        for held, nothing in ((self._key, 0), (self._id, -1), (self._written_at, -1)):
            held[-1:].fill_(nothing)

    @abstractmethod
    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        """Set each query's own slots to -inf, in place; columns are the slots from ``start`` on."""

    @abstractmethod
    def _place(self, ids: Tensor, finite: Tensor) -> Tensor:
        """The slot of each finite row (-1: none); other rows' values are ignored."""

    @abstractmethod
    def _check_ids(self, ids: Tensor) -> None:
        """Raise ValueError for ids this bank cannot hold, where that can be seen without waiting."""


class DatasetBank(Storage):
    """One slot per dataset row: a new key replaces the row's old one, so no row is there twice."""

    kind = "dataset"

    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The slot that holds each id's key, -1 where there is none."""
        return self._id[ids]

    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        """Set each query's own slot to -inf, in place; columns are the slots from ``start`` on."""
        width = similarity.shape[1]
        column = ids - start
        inside = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)[:, None]
        kept = similarity.gather(1, column)
        similarity.scatter_(1, column, kept.masked_fill(inside[:, None], -torch.inf))

    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """1 where the query's own slot is admissible."""
        return (admissible[ids.clamp_min(0)] & (ids >= 0)).long()

    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        """``admissible`` less the slots of ``ids``."""
        return admissible.index_fill(0, ids, False)

    def _place(self, ids: Tensor, finite: Tensor) -> Tensor:
        return ids

    def _check_ids(self, ids: Tensor) -> None:
        # On a GPU the check would make every step wait; indexing asserts there by itself.
        if (
            ids.device.type == "cpu"
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < self.capacity
        ):
            raise ValueError(
                f"ids from {int(ids.min())} to {int(ids.max())}: the bank has a slot for each row 0 to "
                f"{self.capacity - 1}; build it with the number of rows the data set has"
            )


class QueueBank(Storage):
    """FIFO: the newest ``capacity`` keys, whatever the batch sizes; an id may be there several times."""

    kind = "queue"

    def __init__(
        self, capacity: int, dim: int, *, dtype: torch.dtype, device: torch.device, max_age: int | None
    ) -> None:
        super().__init__(capacity, dim, dtype=dtype, device=device, max_age=max_age)
        self._head = torch.zeros((), dtype=torch.int64, device=device)

    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The slot of each id's newest key, -1 where there is none."""
        slots = torch.arange(self.capacity, device=self.device)
        recency = (slots - self._head) % self.capacity
        held = (self.id[None] == ids[:, None]) & (ids >= 0)[:, None]
        newest, slot = torch.where(held, recency[None], -1).max(1)
        return torch.where(newest < 0, -1, slot)

    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        """Set each query's own slots to -inf, in place; columns are the slots from ``start`` on."""
        held = self.id[start : start + similarity.shape[1]]
        similarity.masked_fill_(held[None] == ids[:, None], -torch.inf)

    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """How many admissible slots are each query's own."""
        return ((self.id[None] == ids[:, None]) & admissible[None]).sum(1)

    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        """``admissible`` less the slots of ``ids``."""
        return admissible & ~torch.isin(self.id, ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; the tensors are the bank's own, not copies."""
        return super().state_dict() | {"head": self._head}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved queue.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """
        super().load_state_dict(state)
        self._head.copy_(state["head"])

    def _place(self, ids: Tensor, finite: Tensor) -> Tensor:
        arrival = finite.cumsum(0) - 1
        total = finite.sum()
        slots = (self._head + arrival) % self.capacity
        self._head.copy_((self._head + total) % self.capacity)
        # A batch larger than the queue pushes its own first rows out.
        return torch.where(arrival < total - self.capacity, -1, slots)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"id {int(ids.min())}: ids are 0 or more, -1 marks an empty slot")


def build_storage(config: BankConfig, *, rows: int, dim: int, device: torch.device) -> Storage:
    """The bank that ``config`` asks for, for a dataset of ``rows`` on a model of ``device``.

    Raises:
        ValueError: ``bank.device=accelerator`` where the model is on the CPU.
    """
    place = place_of(config, device)
    kind = DatasetBank if config.kind == "dataset" else QueueBank
    capacity = rows if config.capacity is None else config.capacity
    return kind(capacity, dim, dtype=DTYPES[config.dtype], device=place, max_age=config.max_age)


def place_of(config: BankConfig, device: torch.device) -> torch.device:
    """Where the bank lives if the model is on ``device``.

    Raises:
        ValueError: ``bank.device=accelerator`` where the model is on the CPU.
    """
    if config.device == "accelerator" and device.type == "cpu":
        raise ValueError("bank.device=accelerator: the model is on the CPU; use bank.device=auto or cpu")
    return torch.device("cpu") if config.device == "cpu" else device


def _last_equal(slots: Tensor) -> Tensor:
    """For each position, the last position of the same slot: writes to one slot then all carry one value.

    (Scattering with repeated indices leaves the winner open, on the CPU as on CUDA.)
    """
    ordered, order = slots.sort(stable=True)
    return order[torch.searchsorted(ordered, slots, right=True) - 1]

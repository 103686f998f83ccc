"""Store embeddings in one slot per dataset row, or in a FIFO queue.

These tensors are the source of truth: every index is derived from the *stored* values, rounded to the
storage dtype, so that search, loss and checkpoint use the same vectors.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.config import BankConfig
from memory_bank.draw import draw_slots

# Values of stored keys that are copied at a time to be scored: 128 MiB of float32.
_COPIED = 1 << 25

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Storage(Bank):
    """Keep all slots of a bank in this process.

    Nothing here synchronises with the device: a refused row goes to a spare last slot, which is then
    cleared. Index -1 is that slot as well, so a missing slot reads as a zero key of id -1, never as another
    row.
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
    @override
    def key(self) -> Float[Tensor, "n d"]:
        return self._key[:-1]

    @property
    @override
    def id(self) -> Int[Tensor, " n"]:
        return self._id[:-1]

    @property
    @override
    def written_at(self) -> Int[Tensor, " n"]:
        return self._written_at[:-1]

    @property
    @override
    def device(self) -> torch.device:
        return self._key.device

    @override
    def fill(self) -> Float[Tensor, ""]:
        return (self.id >= 0).float().mean()

    @override
    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        # One comparison for both, as empty slots have written_at -1: every step examines all slots.
        return self.written_at >= (0 if self.max_age is None else max(0, step - self.max_age))

    @override
    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        return admissible.sum()

    @override
    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        return draw_slots(admissible, count, key)

    @override
    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        rows = torch.where(slots < 0, self.capacity, slots).flatten()
        return self._key.index_select(0, rows).float().view(*slots.shape, self.dim)

    @override
    def score(
        self, query: Float[Tensor, "b d"], slots: Int[Tensor, "b c"], admissible: Bool[Tensor, " n"]
    ) -> Float[Tensor, "b c"]:
        # A few queries at a time, to bound the gathered copy.
        step = max(1, _COPIED // (max(1, slots.shape[1]) * self.dim))
        parts = [
            torch.bmm(self.read(slots[start : start + step]), query[start : start + step, :, None])[:, :, 0]
            for start in range(0, slots.shape[0], step)
        ]
        similarity = torch.cat(parts) if parts else query.new_zeros(slots.shape)
        return similarity.masked_fill(~((slots >= 0) & admissible[slots.clamp_min(0)]), -torch.inf)

    @override
    def every_row(
        self, admissible: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"], Bool[Tensor, " m"]]:
        return self.key.float(), self.id, admissible

    @override
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        return self._id[slots]

    @override
    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        return (step - self._written_at[slots]).float().masked_fill(self._id[slots] < 0, torch.nan)

    @torch.no_grad()
    @override
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store ``keys`` (unit rows, taken as they are).

        Args:
            keys: Any float dtype, any device. A row that is not finite in the storage dtype is refused
                and counted; its slot keeps the key that it holds.
            ids: Their dataset rows. If an id comes twice, a dataset bank keeps the last finite row.
            step: The optimizer step that computed them.

        Returns:
            The slot of each row, -1 where it was refused or pushed out by the same write; in a dataset bank,
            equal ids have equal slots.

        Raises:
            ValueError: shapes that do not fit the bank, or (checked on the CPU only) ids outside it.
        """
        self._check_ids(ids)
        rounded, ids, finite = accept(self, keys, ids)
        slots = torch.where(finite, self._assign_slots(ids, finite), -1)
        self.put(rounded, ids, slots, step)
        self.refused += (~finite).sum()
        return slots

    def put(
        self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], slots: Int[Tensor, " g"], step: int
    ) -> None:
        """Store ``keys`` of the storage dtype in ``slots`` (-1: nowhere); of equal slots, the last counts."""
        slots = torch.where(slots < 0, self.capacity, slots)
        source = _last_equal(slots)
        self._key[slots] = keys[source]
        self._id[slots] = ids[source]
        self._written_at.index_fill_(0, slots, step)
        self._clear_spare()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "key": self.key,
            "id": self.id,
            "written_at": self.written_at,
            "refused": self.refused,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.require_fit(state)
        self.key.copy_(state["key"])
        self.id.copy_(state["id"])
        self.written_at.copy_(state["written_at"])
        self.refused.copy_(state["refused"])

    def _clear_spare(self) -> None:
        # Filled, not assigned: assigning a number copies it from the host, which is a device sync.
        for tensor, value in ((self._key, 0), (self._id, -1), (self._written_at, -1)):
            tensor[-1:].fill_(value)

    @abstractmethod
    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        """Set each query's own slots to -inf, in place; columns are the slots from ``start`` on."""

    @abstractmethod
    def _assign_slots(self, ids: Tensor, finite: Tensor) -> Tensor:
        """Return the slot of each finite row (-1: none); values of other rows are ignored."""

    @abstractmethod
    def _check_ids(self, ids: Tensor) -> None:
        """Raise ValueError for ids that this bank cannot hold, if that needs no device sync."""


class DatasetBank(Storage):
    """Keep one slot per dataset row: a new key replaces the row's old one, so no row has two keys."""

    kind = "dataset"

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> "DatasetBank":
        """Return a float32 bank of unit rows on their device; row i has id i, step 0, no age limit."""
        bank = cls(*rows.shape, dtype=torch.float32, device=rows.device, max_age=None)
        bank.write(rows, torch.arange(len(rows), device=rows.device), step=0)
        return bank

    @override
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        # A data set bank's slot is the row: the stored id is the slot, and -1 where nothing was written.
        return self._id[ids]

    @override
    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        width = similarity.shape[1]
        column = ids - start
        inside = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)[:, None]
        current = similarity.gather(1, column)
        similarity.scatter_(1, column, current.masked_fill(inside[:, None], -torch.inf))

    @override
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return (admissible[ids.clamp_min(0)] & (ids >= 0)).long()

    @override
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        return admissible.index_fill(0, ids, False)

    @override
    def _assign_slots(self, ids: Tensor, finite: Tensor) -> Tensor:
        return ids

    @override
    def _check_ids(self, ids: Tensor) -> None:
        check_rows(ids, self.capacity)


class QueueBank(Storage):
    """Keep the newest ``capacity`` keys (FIFO), for any batch sizes; an id may have several keys."""

    kind = "queue"

    def __init__(
        self, capacity: int, dim: int, *, dtype: torch.dtype, device: torch.device, max_age: int | None
    ) -> None:
        super().__init__(capacity, dim, dtype=dtype, device=device, max_age=max_age)
        self._head = torch.zeros((), dtype=torch.int64, device=device)

    @override
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        slots = torch.arange(self.capacity, device=self.device)
        recency = (slots - self._head) % self.capacity
        own = (self.id[None] == ids[:, None]) & (ids >= 0)[:, None]
        newest, slot = torch.where(own, recency[None], -1).max(1)
        return torch.where(newest < 0, -1, slot)

    @override
    def hide_own(self, similarity: Float[Tensor, "b c"], ids: Int[Tensor, " b"], start: int) -> None:
        slot_ids = self.id[start : start + similarity.shape[1]]
        similarity.masked_fill_(slot_ids[None] == ids[:, None], -torch.inf)

    @override
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return ((self.id[None] == ids[:, None]) & admissible[None]).sum(1)

    @override
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        return admissible & ~torch.isin(self.id, ids)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"head": self._head}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._head.copy_(state["head"])

    @override
    def _assign_slots(self, ids: Tensor, finite: Tensor) -> Tensor:
        return next_slots(self._head, self.capacity, finite)

    @override
    def _check_ids(self, ids: Tensor) -> None:
        check_not_negative(ids)


def accept(
    bank: Bank, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"]
) -> tuple[Float[Tensor, "g d"], Int[Tensor, " g"], Bool[Tensor, " g"]]:
    """Round ``keys`` to the dtype of ``bank``, on its device, and say which are finite then.

    Raises:
        ValueError: shapes that do not fit the bank.
    """
    if keys.ndim != 2 or keys.shape[1] != bank.dim or ids.shape != keys.shape[:1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and ids {tuple(ids.shape)}: (g, {bank.dim}) and (g,) are needed"
        )
    rounded = keys.detach().to(bank.device, bank.key.dtype)
    return rounded, ids.to(bank.device), rounded.isfinite().all(1)


def next_slots(head: Int[Tensor, ""], capacity: int, finite: Bool[Tensor, " g"]) -> Int[Tensor, " g"]:
    """Return the slot of each finite row of a batch in a queue, and move ``head``, in place, past them.

    A batch larger than the queue pushes its own first rows out: their slot is -1.
    """
    arrival = finite.cumsum(0) - 1
    total = finite.sum()
    slots = (head + arrival) % capacity
    head.copy_((head + total) % capacity)
    return torch.where(arrival < total - capacity, -1, slots)


def check_rows(ids: Int[Tensor, " g"], rows: int) -> None:
    """Raise ValueError for ids that no dataset of ``rows`` has.

    Not on a GPU, where it would synchronise every step: there, indexing itself asserts.
    """
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise ValueError(
            f"ids from {int(ids.min())} to {int(ids.max())}: the bank has a slot for each row 0 to "
            f"{rows - 1}; build it with the number of rows the data set has"
        )


def check_not_negative(ids: Int[Tensor, " g"]) -> None:
    """Raise ValueError for ids below 0, unless they are on a GPU."""
    if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"id {int(ids.min())}: ids are 0 or more, -1 marks an empty slot")


def build_storage(config: BankConfig, *, rows: int, dim: int, device: torch.device) -> Storage:
    """Build the bank of ``config`` for a dataset of ``rows`` and a model on ``device``.

    Raises:
        ValueError: ``bank.device=accelerator`` where the model is on the CPU.
    """
    kind = QueueBank if config.kind == "queue" else DatasetBank
    capacity = rows if config.capacity is None else config.capacity
    return kind(
        capacity, dim, dtype=DTYPES[config.dtype], device=bank_device(config, device), max_age=config.max_age
    )


def bank_device(config: BankConfig, device: torch.device) -> torch.device:
    """Return the device of the bank for a model on ``device``.

    Raises:
        ValueError: ``bank.device=accelerator`` where the model is on the CPU.
    """
    if config.device == "accelerator" and device.type == "cpu":
        raise ValueError("bank.device=accelerator: the model is on the CPU; use bank.device=auto or cpu")
    return torch.device("cpu") if config.device == "cpu" else device


def _last_equal(slots: Tensor) -> Tensor:
    """Return, for each position, the last position of the same slot.

    All writes to one slot then carry the same value. Which of several values a scatter with repeated indices
    keeps is undefined, on the CPU and on CUDA.
    """
    ordered, order = slots.sort(stable=True)
    return order[torch.searchsorted(ordered, slots, right=True) - 1]

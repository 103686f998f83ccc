"""Spread a bank over processes, so that each holds a part of the slots.

Slot i lives on rank ``i % world``, in that rank's slot ``i // world``. Outside of this file and of
``sharded_search.py``, slots have global numbers. Methods marked "collective" communicate through an Exchange:
every rank must call them, in the same order, with no rows if it has none.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.draw import domain, examined_first, first, shuffled
from memory_bank.exchange import Exchange
from memory_bank.storage import (
    DatasetBank,
    QueueBank,
    Storage,
    accept,
    check_not_negative,
    check_rows,
    next_slots,
)

# Rows that a rank sends to rank 0 at a time when the bank is saved.
_PIECE = 65_536
# Keys that are compared with their queries at a time.
_SCORED = 65_536


class ShardedBank(Bank):
    """Present global slots of a dataset bank on every rank, of which this rank keeps one in ``world``.

    ``key``, ``id``, ``written_at``, ``admissible`` and ``ages_of`` cover this rank's slots alone. Slots in
    arguments are below the capacity, or -1.
    """

    kind = "dataset"
    _stores: type[Storage] = DatasetBank

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_age: int | None,
        exchange: Exchange,
    ) -> None:
        if capacity < exchange.world:
            raise ValueError(
                f"bank.placement=sharded: {capacity} rows over {exchange.world} ranks leave one empty; "
                "use bank.placement=replicated"
            )
        self._exchange, self.capacity, self.dim, self.max_age = exchange, capacity, dim, max_age
        share = len(range(exchange.rank, capacity, exchange.world))
        self._shard = self._stores(share, dim, dtype=dtype, device=device, max_age=max_age)
        self.refused = self._shard.refused

    @property
    @override
    def local(self) -> Storage:
        """This rank's rows as a bank of their own, with local slots."""
        return self._shard

    @property
    @override
    def key(self) -> Float[Tensor, "n d"]:
        return self._shard.key

    @property
    @override
    def id(self) -> Int[Tensor, " n"]:
        return self.outside(self._shard.id)

    @property
    @override
    def written_at(self) -> Int[Tensor, " n"]:
        return self._shard.written_at

    @property
    @override
    def device(self) -> torch.device:
        return self._shard.device

    @override
    def fill(self) -> Float[Tensor, ""]:
        """Return the share of all slots that hold a key. Collective."""
        return self.count(self._shard.id >= 0) / self.capacity

    @override
    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        return self._shard.admissible(step)

    @override
    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        """Count the admissible slots of all ranks. Collective."""
        return self.total(admissible.sum())

    @override
    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """Draw as draw_slots does, over all ranks' slots; equal on ranks with the same key. Collective."""
        n, whole = self.capacity, domain(self.capacity)
        count = min(count, n)
        examined = examined_first(n, count)
        while True:  # memory follows the count, not the bank
            slots = shuffled(torch.arange(examined, device=self.device), n, key)
            inside = self.inside(slots.masked_fill_(slots >= n, -1))
            mine = (inside >= 0) & admissible[inside]
            if examined == whole or int(self.count(mine)) >= count:
                break
            examined = min(whole, 4 * examined)
        found = first(mine, min(count, examined))
        positions = torch.cat(self._exchange.gather(found[found < examined])).sort().values[:count]
        missing = positions.new_full((count - len(positions),), -1)
        return torch.cat([shuffled(positions, n, key), missing])

    @override
    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Return the stored keys of ``slots`` as float32, from their ranks; zero for -1. Collective."""
        rows = self._ask(slots.flatten()[:, None], lambda _, asked: self._shard.key[asked[:, 0]])
        return rows.float().reshape(*slots.shape, self.dim)

    @override
    def score(
        self, query: Float[Tensor, "b d"], slots: Int[Tensor, "b c"], admissible: Bool[Tensor, " n"]
    ) -> Float[Tensor, "b c"]:
        """Compute each similarity on the rank that holds the key: it sends a number, no key. Collective."""
        queries = self._exchange.gather(query)
        place = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)

        def answer(sender: int, asked: Int[Tensor, "m 2"]) -> Float[Tensor, "m 1"]:
            parts = [
                (queries[sender][at] * self._shard.read(slot)).sum(1)
                for slot, at in (part.T for part in torch.split(asked, _SCORED))
            ]
            scores = torch.cat(parts) if parts else query.new_zeros(0)
            return scores.masked_fill(~admissible[asked[:, 0]], -torch.inf)[:, None]

        scores = self._ask(torch.stack([slots.flatten(), place.flatten()], 1), answer)
        return scores.reshape(slots.shape).masked_fill(slots < 0, -torch.inf)

    @override
    def every_row(
        self, admissible: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"], Bool[Tensor, " m"]]:
        """Gather all rows of all ranks, as one bank keeps them. Collective."""
        keys, ids, mask = (self._interleaved(part) for part in (self.key, self.id, admissible))
        return keys.float(), ids, mask

    @override
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return ``slots``: a slot's number is its dataset row."""
        return slots

    @override
    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Return the optimizer steps since ``slots`` were written; nan for -1 and slots of other ranks."""
        return self._shard.ages_of(self.inside(slots), step)

    @torch.no_grad()
    @override
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store this rank's rows of the gathered ``keys``; returns the slots of all, equal on all ranks."""
        self._check_ids(ids)
        rounded, ids, finite = accept(self, keys, ids)
        slots = torch.where(finite, self._assign_slots(ids, finite), -1)
        self._shard.put(rounded, self.own(ids), self.inside(slots), step)
        self.refused += (~finite).sum()
        return slots

    @override
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return ``ids``, the slots, where they hold a key; else -1. Collective."""
        held = self._ask(ids[:, None], lambda _, asked: self._shard.id[asked[:, 0], None] >= 0)
        return ids.masked_fill(~held[:, 0], -1)

    @override
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Count the admissible slots that hold each query's own row, on whichever rank. Collective."""
        shares = self._exchange.gather(ids)
        own = self._shard.num_own(admissible, self.own(torch.cat(shares)))
        return torch.split(self.total(own), [len(share) for share in shares])[self._exchange.rank]

    @override
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        own = self.own(ids)
        return self._shard.without(admissible, own[own >= 0])

    @override
    def total(self, values: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the sum of ``values`` over all ranks. Collective."""
        return self._exchange.total(values)

    @override
    def share(self, values: Int[Tensor, " g"]) -> Int[Tensor, " b"]:
        return values.tensor_split(self._exchange.world)[self._exchange.rank]

    @override
    def joined(self, values: Int[Tensor, "b ..."]) -> Int[Tensor, "g ..."]:
        """Return the ``values`` of all ranks, in the order of ``share``. Collective."""
        return torch.cat(self._exchange.gather(values))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the whole bank, as a replicated one saves it, on rank 0; nothing elsewhere. Collective."""
        parts = {name: self.to_first(getattr(self, name)) for name in ("key", "id", "written_at")}
        state = {"kind": self.kind, "refused": self.refused}
        return state | parts if self._exchange.rank == 0 else state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's rows of a saved bank, whatever its placement was.

        A run resumed from the command line keeps its bank.placement: config.yaml may not differ in it.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """
        self.require_fit(state)
        rows = slice(self._exchange.rank, None, self._exchange.world)
        parts = {name: state[name][rows] for name in ("key", "id", "written_at")}
        own = self.own(parts["id"])
        self._shard.load_state_dict({**state, **parts, "id": own})

    def to_first(self, rows: Int[Tensor, "n ..."] | Float[Tensor, "n ..."] | Bool[Tensor, " n"]) -> Tensor:
        """Gather ``rows``, one a slot, in global order on the CPU of rank 0; elsewhere none. Collective."""
        rank, world = self._exchange.rank, self._exchange.world
        whole = torch.empty(self.capacity if rank == 0 else 0, *rows.shape[1:], dtype=rows.dtype)
        for start in range(0, -(-self.capacity // world), _PIECE):
            piece = rows[start : start + _PIECE]
            for sender, part in enumerate(self._exchange.swap([piece] + [rows[:0]] * (world - 1))):
                first = start * world + sender
                if len(part):
                    whole[first : first + len(part) * world : world] = part.cpu()
        return whole

    def inside(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Convert global slots to this rank's; -1 for -1 and for those of other ranks."""
        mine = (slots >= 0) & (slots % self._exchange.world == self._exchange.rank)
        return torch.where(mine, slots // self._exchange.world, -1)

    def outside(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Convert this rank's slots to global ones; -1 for -1."""
        return torch.where(slots < 0, -1, slots * self._exchange.world + self._exchange.rank)

    def own(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Convert dataset rows to those that ``local`` stores: its slots; -1 for the rows of other ranks."""
        return self.inside(ids)

    def _assign_slots(self, ids: Tensor, finite: Tensor) -> Tensor:
        return ids

    def _check_ids(self, ids: Tensor) -> None:
        check_rows(ids, self.capacity)

    def _ask(
        self, questions: Int[Tensor, "m q"], answer: Callable[[int, Tensor], Tensor]
    ) -> Float[Tensor, "m ..."] | Int[Tensor, "m ..."] | Bool[Tensor, "m ..."]:
        """Send each question to the rank that holds its slot, and return the answers. Collective.

        Args:
            questions: A slot each, and what the answer needs beside it.
            answer: Makes a row of each question, from the number of the rank that asks, and the questions
                with local slots.

        Returns:
            Zero for slot -1.
        """
        world, slots = self._exchange.world, questions[:, 0]
        owner = torch.where(slots < 0, world, slots % world)
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=world + 1).tolist()
        asked = self._exchange.swap(torch.split(questions[order], sizes)[:world])
        local = [torch.cat([each[:, :1] // world, each[:, 1:]], 1) for each in asked]
        received = torch.cat(self._exchange.swap([answer(*each) for each in enumerate(local)]))
        answers = received.new_zeros(len(slots), *received.shape[1:])
        answers[order[: len(received)]] = received
        return answers

    def _interleaved(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows in global order, on every rank. Collective."""
        whole = rows.new_empty(self.capacity, *rows.shape[1:])
        for sender, part in enumerate(self._exchange.gather(rows)):
            whole[sender :: self._exchange.world] = part
        return whole


class ShardedQueue(ShardedBank):
    """Present global slots of a queue on every rank, of which this rank keeps one in ``world``.

    Every rank sees all keys that arrive, so each knows the slot of each.
    """

    kind = "queue"
    _stores = QueueBank

    @cached_property
    def _head(self) -> Int[Tensor, ""]:
        """Return the slot that the next key is written to, equal on all ranks."""
        return torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    @override
    def id(self) -> Int[Tensor, " n"]:
        return self._shard.id

    @override
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the dataset rows of ``slots``, from their ranks; -1 for -1 and empty ones. Collective."""
        ids = self._ask(slots.flatten()[:, None], lambda _, asked: self._shard.id[asked[:, 0]])
        return ids.reshape(slots.shape).masked_fill(slots < 0, -1)

    @override
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return the slot of each id's newest key, on whichever rank, -1 where there is none. Collective."""
        shares = self._exchange.gather(ids)
        slots = self.outside(torch.arange(len(self.id), device=self.device))
        recency = (slots - self._head) % self.capacity
        asked = torch.cat(shares)[:, None]
        newest = torch.where((self.id[None] == asked) & (asked >= 0), recency[None], -1).amax(1)
        mine = self._exchange.swap(torch.split(newest, [len(share) for share in shares]))
        best = torch.stack(mine).amax(0)
        return torch.where(best < 0, -1, (best + self._head) % self.capacity)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"head": self._head}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._head.copy_(state["head"])

    @override
    def own(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return ``ids``: a queue stores the dataset row of each key."""
        return ids

    @override
    def _assign_slots(self, ids: Tensor, finite: Tensor) -> Tensor:
        return next_slots(self._head, self.capacity, finite)

    @override
    def _check_ids(self, ids: Tensor) -> None:
        check_not_negative(ids)

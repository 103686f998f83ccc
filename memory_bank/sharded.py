"""Spread a dataset bank over processes, so that each holds a part of the rows.

Row i lives on rank ``i % world``, in that rank's slot ``i // world``. Every rank has queries of its own: they
are gathered, each rank searches its rows for all of them, and each query's rank merges the results, so that
the answer is that of one bank with all rows. Outside of this file, slots have global numbers.

How processes communicate is left to an :class:`Exchange`. Methods marked "collective" use it: every rank must
call them, in the same order, with no rows if it has none.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.choose import EXACT_ROWS_CPU, is_sampled, sample_size
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.draw import domain, first, shuffled
from memory_bank.methods.base import MiningMethod
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.retrieval.exact import Exact, Subsample
from memory_bank.retrieval.flat import Flat
from memory_bank.storage import DTYPES, DatasetBank, bank_device

# Rows that a rank sends to rank 0 at a time when the bank is saved.
_PIECE = 65_536


@runtime_checkable
class Exchange(Protocol):
    """Communication between the processes that share a bank.

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


class ShardedBank(Bank):
    """Present global slots on every rank, of which this rank keeps one in ``world``.

    ``key``, ``id``, ``written_at``, ``refused``, ``admissible`` and ``ages_of`` cover this rank's slots
    alone. Slots in arguments must come from this bank's searches (so they hold a key), or be -1.
    """

    kind = "dataset"

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
        self._shard = DatasetBank(share, dim, dtype=dtype, device=device, max_age=max_age)
        self.refused = self._shard.refused

    @property
    @override
    def local(self) -> DatasetBank:
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
        return self._exchange.total(admissible.sum())

    @override
    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """Draw as draw_slots does, over all ranks' slots; equal on ranks with the same key. Collective."""
        n, whole = self.capacity, domain(self.capacity)
        count = min(count, n)
        slots = shuffled(torch.arange(whole, device=self.device), n, key)
        inside = self.inside(slots.masked_fill_(slots >= n, -1))
        mine = first((inside >= 0) & admissible[inside], count)
        positions = torch.cat(self._exchange.gather(mine)).sort().values[:count]
        return shuffled(positions, n, key).masked_fill_(positions == whole, -1)

    @override
    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Return the stored keys of ``slots`` as float32, from their ranks; zero for -1. Collective."""
        world, wanted = self._exchange.world, slots.flatten()
        owner = torch.where(wanted < 0, world, wanted % world)
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=world + 1).tolist()
        requests = self._exchange.swap(torch.split(wanted[order], sizes)[:world])
        replies = [self._shard.key[request // world] for request in requests]
        received = torch.cat(self._exchange.swap(replies))
        rows = received.new_zeros(len(wanted), self.dim)
        rows[order[: len(received)]] = received
        return rows.float().reshape(*slots.shape, self.dim)

    @override
    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return ``slots``: a slot's number is its dataset row."""
        return slots

    @override
    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Return the optimizer steps since ``slots`` were written; nan for -1 and slots of other ranks."""
        return self._shard.ages_of(self.inside(slots), step)

    @override
    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Store this rank's rows of the gathered ``keys``; returns -1 for the rows of other ranks."""
        ids = ids.to(self.device)
        mine = (ids % self._exchange.world == self._exchange.rank).nonzero()[:, 0]
        slots = torch.full_like(ids, -1)
        written = self._shard.write(keys.to(self.device)[mine], ids[mine] // self._exchange.world, step)
        slots[mine] = self.outside(written)
        return slots

    @override
    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return ``ids``: a slot's number is its dataset row."""
        return ids

    @override
    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return 1 where the query's own slot is admissible, on whichever rank. Collective."""
        shares = self._exchange.gather(ids)
        own = self._shard.num_own(admissible, self.inside(torch.cat(shares)))
        total = self._exchange.total(own)
        return torch.split(total, [len(share) for share in shares])[self._exchange.rank]

    @override
    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        inside = self.inside(ids)
        return self._shard.without(admissible, inside[inside >= 0])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the whole bank, as a replicated one saves it, on rank 0; nothing elsewhere. Collective."""
        saved = self._shard.state_dict()
        parts = {name: self._to_first(saved[name]) for name in ("key", "id", "written_at")}
        state = {"kind": self.kind, "refused": self._exchange.total(self.refused)}
        if self._exchange.rank == 0:
            rows = torch.arange(self.capacity)
            parts["id"] = torch.where(parts["written_at"] < 0, -1, rows)
            state |= parts
        return state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's rows of a saved bank, whatever its placement was.

        A run resumed from the command line keeps its bank.placement: config.yaml may not differ in it.

        Raises:
            ValueError: another kind, capacity, dimension or dtype.
        """
        self.require_fit(state)
        rows = slice(self._exchange.rank, None, self._exchange.world)
        written_at = state["written_at"][rows]
        refused = state["refused"] if self._exchange.rank == 0 else torch.zeros_like(state["refused"])
        local_id = torch.where(written_at < 0, -1, torch.arange(len(written_at), device=written_at.device))
        shard = {"key": state["key"][rows], "id": local_id, "written_at": written_at, "refused": refused}
        self._shard.load_state_dict({"kind": self.kind, **shard})

    def _to_first(self, rows: Tensor) -> Tensor:
        """Gather all ranks' rows in global order on the CPU of rank 0, piece by piece; elsewhere nothing."""
        rank, world = self._exchange.rank, self._exchange.world
        whole = torch.empty(self.capacity if rank == 0 else 0, *rows.shape[1:], dtype=rows.dtype)
        for start in range(0, -(-self.capacity // world), _PIECE):
            piece = rows[start : start + _PIECE]
            for sender, part in enumerate(self._exchange.swap([piece] + [rows[:0]] * (world - 1))):
                first = start * world + sender
                if len(part):
                    whole[first : first + len(part) * world : world] = part.cpu()
        return whole

    def inside(self, ids: Tensor) -> Tensor:
        """Convert global slots to this rank's; -1 for -1 and for those of other ranks."""
        mine = (ids >= 0) & (ids % self._exchange.world == self._exchange.rank)
        return torch.where(mine, ids // self._exchange.world, -1)

    def outside(self, slots: Tensor) -> Tensor:
        """Convert this rank's slots to global ones; -1 for -1."""
        return torch.where(slots < 0, -1, slots * self._exchange.world + self._exchange.rank)


def build_sharded(
    bank: BankConfig,
    mining: MiningConfig,
    method: MiningMethod,
    exchange: Exchange | None,
    *,
    rows: int,
    dim: int,
    device: torch.device,
) -> tuple[ShardedBank, Retrieval]:
    """Build this rank's part of the bank of the configs, and its search.

    Raises:
        ValueError: no exchange, or a setting that a rank with a part of the rows cannot serve.
    """
    refused = {
        f"mining.method={mining.method} (every rank would need every row)": method.reads_every_row,
        "mining.query=stored (look-ups run ahead of the step)": mining.query == "stored",
        f"mining.index={mining.index} (its centroids would be a rank's own)": mining.index
        not in ("auto", "Flat"),
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"bank.placement=sharded cannot be combined with {setting}; use bank.placement=replicated, "
                "or mining.method=ranked or full_bank with mining.query=fresh and mining.index=auto"
            )
    if exchange is None:
        raise ValueError("bank.placement=sharded needs a way to the other ranks (argument exchange)")
    home = bank_device(bank, device)
    whole = ShardedBank(
        rows, dim, dtype=DTYPES[bank.dtype], device=home, max_age=bank.max_age, exchange=exchange
    )
    if is_sampled(mining, whole, method):
        every = ShardedSearch(whole, Exact(whole.local), exchange)
        return whole, Subsample(whole, sample_size(mining), every)
    indexed = home.type == "cpu" and whole.local.capacity > EXACT_ROWS_CPU
    flat = mining.backend == "faiss" or (mining.backend == "auto" and indexed)
    search = Flat(whole.local) if flat else Exact(whole.local)
    return whole, ShardedSearch(whole, search, exchange)


class ShardedSearch(Retrieval):
    """Search each rank's rows for the queries of all ranks, and merge the results. Collective.

    Args:
        bank: The bank.
        search: Search backend of this rank's rows.
        exchange: Communication with the other ranks.
    """

    def __init__(self, bank: ShardedBank, search: Retrieval, exchange: Exchange) -> None:
        self._bank, self._inner, self._exchange = bank, search, exchange
        self.hides_above = search.hides_above

    @override
    def search(
        self,
        query: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        k: int,
        *,
        admissible: Bool[Tensor, " n"],
        ceiling: Float[Tensor, " b"] | None = None,
        key: int = 0,
    ) -> Candidates:
        shares = self._exchange.gather(ids)
        queries = torch.cat(self._exchange.gather(query))
        limits = None if ceiling is None else torch.cat(self._exchange.gather(ceiling))
        inside = self._bank.inside(torch.cat(shares))
        candidates = self._inner.search(queries, inside, k, admissible=admissible, ceiling=limits, key=key)
        sizes = [len(share) for share in shares]
        # A rank with one row less may return one candidate less, but swapped tensors have equal widths.
        missing = min(k, -(-self._bank.capacity // self._exchange.world)) - candidates.slots.shape[1]
        outside = pad(self._bank.outside(candidates.slots), (0, missing), value=-1)

        def mine(values: Tensor) -> list[Tensor]:
            return self._exchange.swap(torch.split(values, sizes))

        slots = torch.cat(mine(outside), 1)
        similarity = torch.cat(mine(pad(candidates.similarity, (0, missing), value=-torch.inf)), 1)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        counts = torch.stack(mine(torch.stack([candidates.rows, candidates.above], 1))).sum(0)
        width = min(k, self._bank.capacity)
        slots = slots.gather(1, order)[:, :width]
        return Candidates(slots, similarity[:, :width], counts[:, 0], counts[:, 1], share=1.0)

    @override
    def update(self, slots: Int[Tensor, " g"]) -> None:
        """Update the index with the new keys in ``slots`` of this rank."""
        self._inner.update(self._bank.inside(slots))

    @override
    def describe(self) -> str:
        return f"on each of {self._exchange.world} ranks {self._inner.describe()}"

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    @override
    def close(self) -> None:
        self._inner.close()

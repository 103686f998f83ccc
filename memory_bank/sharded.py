"""A dataset bank spread over processes: each holds the rows of its turn, and no process the whole.

Row i lives on rank ``i % world``, in that rank's slot ``i // world``. Every rank has queries of its own: they
are gathered, each rank searches its rows for all of them, and each query's rank merges what comes back, so
that the answer is that of one bank with all rows. Slots keep their global numbers outside of this file.

Nothing here knows how processes talk: an :class:`Exchange` is handed in. Whatever takes part in one says so
("collective"): every rank must call it, in the same order, if only with no rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from memory_bank.bank import Bank
from memory_bank.choose import EXACT_ROWS_CPU, is_sampled, sample_size
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.draw import domain, first, shuffled
from memory_bank.methods.base import Method
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.retrieval.exact import Exact, Subsample
from memory_bank.retrieval.flat import Flat
from memory_bank.storage import DTYPES, DatasetBank, place_of

# Rows that a rank sends to the first at once when the bank is saved.
_PIECE = 65_536


@runtime_checkable
class Exchange(Protocol):
    """How the processes that share a bank talk to each other.

    Attributes:
        rank: This process, from 0.
        world: Processes in all.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102 - see the class
    @property
    def world(self) -> int: ...  # noqa: D102 - see the class

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's ``rows``, by rank; their number may differ, shape and dtype of a row may not."""

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """``parts[r]`` goes to rank r; returns what each rank had for this one, by rank."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of integer ``values`` of one shape."""


class ShardedBank(Bank):
    """The bank as every rank sees it: global slots, of which this rank keeps one in ``world``.

    ``key``, ``id``, ``written_at``, ``refused``, ``admissible`` and ``ages_of`` speak of this rank's slots
    alone. Slots that are handed in must have been found here (so they hold a key), or be -1.
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
    def local(self) -> DatasetBank:
        """This rank's rows, under slots of their own."""
        return self._shard

    @property
    def key(self) -> Float[Tensor, "n d"]:
        """This rank's keys."""
        return self._shard.key

    @property
    def id(self) -> Int[Tensor, " n"]:
        """Dataset row of each of this rank's slots, -1 where nothing was written."""
        return self.outside(self._shard.id)

    @property
    def written_at(self) -> Int[Tensor, " n"]:
        """Optimizer step that wrote each of this rank's slots."""
        return self._shard.written_at

    @property
    def device(self) -> torch.device:
        """Where the slots live."""
        return self._shard.device

    def fill(self) -> Float[Tensor, ""]:
        """Share of all slots that hold a key. Collective."""
        return self.count(self._shard.id >= 0) / self.capacity

    def admissible(self, step: int) -> Bool[Tensor, " n"]:
        """This rank's slots that hold a key not older than ``max_age`` steps."""
        return self._shard.admissible(step)

    def count(self, admissible: Bool[Tensor, " n"]) -> Int[Tensor, ""]:
        """How many slots are admissible on all ranks. Collective."""
        return self._exchange.total(admissible.sum())

    def draw(self, admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
        """As draw_slots over all ranks' slots: the same for every rank that has the same key. Collective."""
        n, whole = self.capacity, domain(self.capacity)
        count = min(count, n)
        slots = shuffled(torch.arange(whole, device=self.device), n, key)
        inside = self.inside(slots.masked_fill_(slots >= n, -1))
        found = first((inside >= 0) & admissible[inside], count)
        place = torch.cat(self._exchange.gather(found)).sort().values[:count]
        return shuffled(place, n, key).masked_fill_(place == whole, -1)

    def read(self, slots: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Stored keys of ``slots`` as float32, from the ranks that hold them; zero for -1. Collective."""
        world, wanted = self._exchange.world, slots.flatten()
        owner = torch.where(wanted < 0, world, wanted % world)
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=world + 1).tolist()
        asked = self._exchange.swap(torch.split(wanted[order], sizes)[:world])
        held = [self._shard.key[part // world] for part in asked]
        found = torch.cat(self._exchange.swap(held))
        rows = found.new_zeros(len(wanted), self.dim)
        rows[order[: len(found)]] = found
        return rows.float().reshape(*slots.shape, self.dim)

    def ids_of(self, slots: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Dataset rows of ``slots``, which are their numbers."""
        return slots

    def ages_of(self, slots: Int[Tensor, "..."], step: int) -> Float[Tensor, "..."]:
        """Optimizer steps since ``slots`` were written; nan for -1 and for those of other ranks."""
        return self._shard.ages_of(self.inside(slots), step)

    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> Int[Tensor, " g"]:
        """Keep this rank's rows of the gathered ``keys``; the slot of each row, -1 where another keeps it."""
        ids = ids.to(self.device)
        mine = (ids % self._exchange.world == self._exchange.rank).nonzero()[:, 0]
        slots = torch.full_like(ids, -1)
        written = self._shard.write(keys.to(self.device)[mine], ids[mine] // self._exchange.world, step)
        slots[mine] = self.outside(written)
        return slots

    def slots_of(self, ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The slot of each id's key."""
        return ids

    def num_own(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """1 where the query's own slot is admissible, wherever it lives. Collective."""
        shares = self._exchange.gather(ids)
        own = self._shard.num_own(admissible, self.inside(torch.cat(shares)))
        total = self._exchange.total(own)
        return torch.split(total, [len(share) for share in shares])[self._exchange.rank]

    def without(self, admissible: Bool[Tensor, " n"], ids: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
        """``admissible`` less this rank's slots of ``ids``."""
        inside = self.inside(ids)
        return self._shard.without(admissible, inside[inside >= 0])

    def state_dict(self) -> dict[str, Any]:
        """The whole bank, as a replicated one saves it, on rank 0; the others give their rows. Collective."""
        saved = self._shard.state_dict()
        parts = {name: self._to_first(saved[name]) for name in ("key", "id", "written_at")}
        state = {"kind": self.kind, "refused": self._exchange.total(self.refused)}
        if self._exchange.rank == 0:
            rows = torch.arange(self.capacity)
            parts["id"] = torch.where(parts["written_at"] < 0, -1, rows)
            state |= parts
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's rows of a saved bank, however it was spread.

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
        """All ranks' rows in global order on the CPU of rank 0, piece by piece; elsewhere nothing."""
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
        """This rank's slots of global ones; -1 for -1 and for those of other ranks."""
        mine = (ids >= 0) & (ids % self._exchange.world == self._exchange.rank)
        return torch.where(mine, ids // self._exchange.world, -1)

    def outside(self, slots: Tensor) -> Tensor:
        """Global numbers of this rank's slots; -1 for -1."""
        return torch.where(slots < 0, -1, slots * self._exchange.world + self._exchange.rank)


def build_sharded(
    bank: BankConfig,
    mining: MiningConfig,
    method: Method,
    exchange: Exchange | None,
    *,
    rows: int,
    dim: int,
    device: torch.device,
) -> tuple[ShardedBank, Retrieval]:
    """This rank's part of the bank that the configs ask for, and its search.

    Raises:
        ValueError: no exchange, or what a rank that holds a part of the rows cannot serve.
    """
    refused = {
        f"mining.method={mining.method} (every rank would need every row)": method.reads_every_row,
        "mining.query=stored (look-ups run ahead of the step)": mining.query == "stored",
        f"mining.index={mining.index} (its centroids would be a rank's own)": mining.index
        not in ("auto", "Flat"),
    }
    for setting, given in refused.items():
        if given:
            raise ValueError(
                f"bank.placement=sharded does not go with {setting}; use bank.placement=replicated, or "
                "mining.method=ranked or full_bank with mining.query=fresh and mining.index=auto"
            )
    if exchange is None:
        raise ValueError("bank.placement=sharded needs a way to the other ranks (argument exchange)")
    place = place_of(bank, device)
    whole = ShardedBank(
        rows, dim, dtype=DTYPES[bank.dtype], device=place, max_age=bank.max_age, exchange=exchange
    )
    if is_sampled(mining, whole, method):
        every = ShardedSearch(whole, Exact(whole.local), exchange)
        return whole, Subsample(whole, sample_size(mining), every)
    indexed = place.type == "cpu" and whole.local.capacity > EXACT_ROWS_CPU
    flat = mining.backend == "faiss" or (mining.backend == "auto" and indexed)
    search = Flat(whole.local) if flat else Exact(whole.local)
    return whole, ShardedSearch(whole, search, exchange)


class ShardedSearch(Retrieval):
    """Each rank's search of its own rows for the queries of all, merged. Collective.

    Args:
        bank: Which rows are where.
        search: Of this rank's rows.
        exchange: To the other ranks.
    """

    def __init__(self, bank: ShardedBank, search: Retrieval, exchange: Exchange) -> None:
        self._bank, self._inner, self._exchange = bank, search, exchange
        self.hides_above = search.hides_above

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
        """See Retrieval.search."""
        shares = self._exchange.gather(ids)
        queries = torch.cat(self._exchange.gather(query))
        limits = None if ceiling is None else torch.cat(self._exchange.gather(ceiling))
        inside = self._bank.inside(torch.cat(shares))
        found = self._inner.search(queries, inside, k, admissible=admissible, ceiling=limits, key=key)
        sizes = [len(share) for share in shares]
        # A part with a row less may have found one less, and what is swapped must be of one width.
        missing = min(k, -(-self._bank.capacity // self._exchange.world)) - found.slots.shape[1]
        outside = pad(self._bank.outside(found.slots), (0, missing), value=-1)

        def mine(values: Tensor) -> list[Tensor]:
            return self._exchange.swap(torch.split(values, sizes))

        slots = torch.cat(mine(outside), 1)
        similarity = torch.cat(mine(pad(found.similarity, (0, missing), value=-torch.inf)), 1)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        counts = torch.stack(mine(torch.stack([found.rows, found.above], 1))).sum(0)
        width = min(k, self._bank.capacity)
        slots = slots.gather(1, order)[:, :width]
        return Candidates(slots, similarity[:, :width], counts[:, 0], counts[:, 1], share=1.0)

    def update(self, slots: Int[Tensor, " g"]) -> None:
        """The bank has new keys in ``slots`` of this rank."""
        self._inner.update(self._bank.inside(slots))

    def describe(self) -> str:
        """One line for the log."""
        return f"on each of {self._exchange.world} ranks {self._inner.describe()}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is saved: an exact search is derived from the bank."""
        self._inner.load_state_dict(state)

    def close(self) -> None:
        """End what runs in the background."""
        self._inner.close()

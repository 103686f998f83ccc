"""Search a bank that is spread over processes: each rank searches its slots for the queries of all ranks.

Every rank has queries of its own: they are gathered, each rank searches its slots for all of them, and each
query's rank merges the results, so that the answer is that of one bank with all slots. An inverted file has
the same centroids on all ranks, those that one bank would train, and each rank's lists hold its own slots.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from memory_bank.backend import choose_backend
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.exchange import Exchange
from memory_bank.methods.base import MiningMethod
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.retrieval.exact import Exact
from memory_bank.retrieval.ivf import reached
from memory_bank.sharded import ShardedBank, ShardedQueue
from memory_bank.storage import DTYPES, bank_device


def build_sharded(
    bank: BankConfig,
    mining: MiningConfig,
    method: MiningMethod,
    exchange: Exchange | None,
    *,
    rows: int,
    dim: int,
    seed: int,
    device: torch.device,
) -> tuple[ShardedBank, Retrieval]:
    """Build this rank's part of the bank of the configs, and its search.

    Raises:
        ValueError: no exchange, or a setting that a rank with a part of the rows cannot serve.
    """
    if method.reads_every_row:
        raise ValueError(
            f"bank.placement=sharded cannot be combined with mining.method={mining.method}, which reads "
            "bank.key as that of every slot; use bank.every_row() in it, or bank.placement=replicated"
        )
    if exchange is None:
        raise ValueError("bank.placement=sharded needs a way to the other ranks (argument exchange)")
    kind = ShardedQueue if bank.kind == "queue" else ShardedBank
    whole = kind(
        rows if bank.capacity is None else bank.capacity,
        dim,
        dtype=DTYPES[bank.dtype],
        device=bank_device(bank, device),
        max_age=bank.max_age,
        exchange=exchange,
    )
    return whole, choose_backend(
        mining, whole, seed=seed, method=method, spread=lambda inner: ShardedSearch(whole, inner, exchange)
    )


def expected_part(k: int, world: int) -> int:
    """Return how many of a query's ``k`` closest rows one of ``world`` ranks hardly ever exceeds.

    Rows are dealt out by their number, so that a rank has about a binomial number of them: the mean, six
    standard deviations and some for the tail of small means.
    """
    mean = k / world
    return min(k, math.ceil(mean + 6 * math.sqrt(mean) + 8))


class ShardedSearch(Retrieval):
    """Search each rank's slots for the queries of all ranks, and merge the results. Collective.

    Each rank is asked for little more than its expected part of the ``k`` closest rows. If for any query its
    last row is among them, it may have more, and all are asked again for as many as there can be.

    Args:
        bank: The bank.
        search: Search backend of this rank's slots.
        exchange: Communication with the other ranks.
    """

    def __init__(self, bank: ShardedBank, search: Retrieval, exchange: Exchange) -> None:
        self._bank, self._inner, self._exchange = bank, search, exchange
        self.hides_above, self.approximate = search.hides_above, search.approximate

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
        own = self._bank.own(torch.cat(shares))
        k = min(k, self._bank.capacity)

        def ask(count: int) -> tuple[Candidates, Tensor]:
            candidates = self._inner.search(
                queries, own, count, admissible=admissible, ceiling=limits, key=key
            )
            return self._merge(candidates, [len(share) for share in shares], count, k)

        most = min(k, -(-self._bank.capacity // self._exchange.world))
        count = min(most, expected_part(k, self._exchange.world))
        found, cut = ask(count)
        cut &= query.any(1)  # zeros stand for a row without a key, to which all rows are alike
        if count < most and int(self._bank.total(cut.sum())):
            found, _ = ask(most)
        return found

    def _merge(
        self, candidates: Candidates, sizes: list[int], count: int, k: int
    ) -> tuple[Candidates, Bool[Tensor, " b"]]:
        """Send each query's rank what was found here, and merge what all ranks found for its own queries.

        Args:
            candidates: Of the queries of all ranks, among this rank's rows.
            sizes: Queries of each rank.
            count: How many candidates of a query were asked for.
            k: How many of all ranks are wanted.

        Returns:
            The candidates, and whether a rank may have more of the ``k`` closest than it returned.
        """

        def mine(values: Tensor) -> list[Tensor]:
            return self._exchange.swap(torch.split(values, sizes))

        # A rank with one row less may return one candidate less, but swapped tensors have equal widths.
        missing = count - candidates.slots.shape[1]
        slots = torch.cat(mine(pad(self._bank.outside(candidates.slots), (0, missing), value=-1)), 1)
        parts = mine(pad(candidates.similarity, (0, missing), value=-torch.inf))
        counts = torch.stack(mine(torch.stack([candidates.rows, candidates.above], 1))).sum(0)
        similarity, order = torch.cat(parts, 1).sort(dim=1, descending=True, stable=True)
        short = (0, max(0, k - similarity.shape[1]))
        slots = pad(slots.gather(1, order), short, value=-1)[:, :k]
        similarity = pad(similarity, short, value=-torch.inf)[:, :k]
        last = torch.cat([part[:, -1:] for part in parts], 1)
        cut = ((last > -torch.inf) & (last >= similarity[:, -1:])).any(1)
        return Candidates(slots, similarity, counts[:, 0], counts[:, 1], share=1.0), cut

    @override
    def update(self, slots: Int[Tensor, " g"]) -> None:
        """Update the index with the new keys in those of ``slots`` that this rank holds."""
        self._inner.update(self._bank.inside(slots))

    @override
    def check(
        self,
        query: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        k: int,
        admissible: Bool[Tensor, " n"],
        step: int,
    ) -> None:
        """Measure recall over the queries of all ranks, which then act on it alike."""
        if self.approximate:
            exact = ShardedSearch(self._bank, Exact(self._bank.local), self._exchange)
            found = self.search(query, ids, k, admissible=admissible)
            true = exact.search(query, ids, k, admissible=admissible)
            self._inner.act_on_recall(self._bank.total(reached(found, true)), k, step)

    @override
    def advance(self, step: int) -> None:
        self._inner.advance(step)

    @override
    def metrics(self) -> dict[str, float]:
        return self._inner.metrics()

    @override
    def index_bytes(self, rows: int) -> int:
        return self._inner.index_bytes(rows)

    @override
    def describe(self) -> str:
        return f"on each of {self._exchange.world} ranks {self._inner.describe()}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the index of all slots, as one bank saves it, on rank 0; nothing elsewhere."""
        state = self._inner.state_dict()
        if "written" in state:
            state["written"] = int(self._bank.total(torch.tensor(state["written"])))
        if "slots" in state:
            state |= self._joined_lists(state["slots"], state["sizes"])
        if "retraining" in state:
            rows = {name: self._bank.to_first(state["retraining"][name]) for name in ("changed", "lists")}
            state["retraining"] = state["retraining"] | rows
        return state if self._exchange.rank == 0 else {}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part of a saved index, whatever the placement of its bank was."""
        if self._exchange.rank and "written" in state:
            state = state | {"written": 0}  # only the sum over all ranks counts
        if "slots" in state:
            state = state | self._own_lists(state["slots"], state["sizes"])
        if "retraining" in state:
            part = slice(self._exchange.rank, None, self._exchange.world)
            rows = {name: state["retraining"][name][part] for name in ("changed", "lists")}
            state = state | {"retraining": state["retraining"] | rows}
        self._inner.load_state_dict(state)

    @override
    def close(self) -> None:
        self._inner.close()

    def _joined_lists(self, slots: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Join the lists of all ranks on rank 0, each rank's slots in their order; elsewhere none."""
        lists = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        mine = torch.stack([self._bank.outside(slots), lists], 1)
        found = torch.cat(self._exchange.swap([mine] + [mine[:0]] * (self._exchange.world - 1)))
        slots, lists = found[found[:, 1].argsort(stable=True)].T
        return {"slots": slots.contiguous(), "sizes": torch.bincount(lists, minlength=len(sizes))}

    def _own_lists(self, slots: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return this rank's slots in list order, and the lengths of its lists."""
        lists, inside = (
            torch.repeat_interleave(torch.arange(len(sizes)), sizes.cpu()),
            self._bank.inside(slots),
        )
        if len(lists) != len(slots):
            raise ValueError(f"lists of {len(lists)} rows, {len(slots)} are needed; the state is damaged")
        held = inside.cpu() >= 0
        return {
            "slots": inside[inside >= 0],
            "sizes": torch.bincount(lists[held], minlength=len(sizes)),
        }

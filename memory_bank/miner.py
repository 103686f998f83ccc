"""Keep a bank of keys and find hard negatives in it: call ``negatives`` and ``write`` once a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank import policy
from memory_bank.backend import choose_backend
from memory_bank.bank import Bank
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.draw import mix
from memory_bank.exchange import Exchange
from memory_bank.lookahead import LookAhead
from memory_bank.methods.base import MiningBatch, MiningMethod, method_of
from memory_bank.methods.in_batch import InBatch
from memory_bank.metrics import LookupStats, Metrics, bank_metrics, mining_metrics
from memory_bank.negatives import Negatives
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.sharded_search import build_sharded
from memory_bank.storage import build_storage
from memory_bank.worker import Inline, Worker

# Queries of a recall check, and the ranks that it compares.
_CHECKED, _CHECKED_RANKS = 64, 256
# Purpose of the random draw of a search.
_SEARCH = 1


class Miner:
    """Find each query's negatives in the bank, and keep the bank up to date.

    Once a step: ``negatives`` (several times with accumulation), then, after the optimizer step, ``write``.
    A key is thus never its own negative. Everything returned is detached. Where the bank lives and is
    searched on the queries' device, the host does not wait for that device.

    Attributes:
        bank: The stored keys.
        retrieval: The search backend.
        config: The settings.
        seed: Determines every draw, together with step and id.
        method: Turns rows of the bank into negatives.
        depth: Rows that a look-up asks for, a query; 0 searches nothing.
    """

    def __init__(
        self,
        bank: Bank,
        retrieval: Retrieval,
        config: MiningConfig,
        *,
        seed: int,
        upcoming: Callable[[int], Tensor | None] | None = None,
        method: MiningMethod | None = None,
    ) -> None:
        self.bank, self.retrieval, self.config, self.seed = bank, retrieval, config, seed
        self.method = method or method_of(config)
        self._ready = False
        self._stats: LookupStats | None = None
        self._step = 0
        self._ahead = None if upcoming is None else LookAhead(bank, self._search_stored, upcoming)
        self._worker = Worker(bank.device) if config.overlap else Inline()
        depth = self.method.depth(config, retrieval.size or bank.capacity)
        # Where an upper bound is applied after the search, the look-up must return what it drops as well.
        late = self._ahead is not None or not retrieval.hides_above or config.false_negative == "attract"
        refills = config.refill and policy.is_bounded_above(config)
        self.depth = 2 * depth if late and refills else depth

    def negatives(
        self,
        query: Float[Tensor, "b d"],
        key: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        step: int,
        *,
        batch_keys: Float[Tensor, "g d"] | None = None,
        batch_ids: Int[Tensor, " g"] | None = None,
    ) -> Negatives:
        """Find the rows that each query is pushed away from; never one of its own id.

        Args:
            query: Unit rows.
            key: The queries' positives, unit rows.
            ids: Dataset rows of the queries.
            step: The optimizer step.
            batch_keys: Keys of the whole batch over all ranks; ``key`` when left out. They are the negatives
                until the bank is filled to ``min_fill``, and stand for their own stale slots where every
                row counts (``all_rows``, ``full_bank``).
            batch_ids: Their dataset rows.

        Returns:
            Detached, on the query's device.
        """
        home, device = query.device, self.bank.device
        query, key, ids = query.detach().float().to(device), key.detach().float().to(device), ids.to(device)
        batch_keys = key if batch_keys is None else batch_keys.detach().float().to(device)
        batch_ids = ids if batch_ids is None else batch_ids.to(device)
        self._step = step
        with _plain(device):
            batch = MiningBatch(query, key, ids, batch_keys, batch_ids, step, self.seed)
            method = self.method if self.ready() else InBatch()
            mined = method.negatives(batch, self.bank, partial(self._look_up, batch), self.config)
            self._stats = mined.stats or LookupStats.of_few(query, batch.positive, mined.negatives, step)
        return mined.negatives.to(home)

    def nearest(
        self, query: Float[Tensor, "b d"], ids: Int[Tensor, " b"], step: int, k: int
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Find the ``k`` closest rows of each query, for galleries and nearest-neighbour positives.

        Args:
            query: Unit rows.
            ids: Rows left out for each query; -1 for a query from outside.
            step: Optimizer step at which keys may be too old.
            k: Number of rows.

        Returns:
            ids, similarity: Closest first; -1 and -inf where there are fewer, and for all until the bank is
                filled to ``min_fill``: an index is trained at its first look-up. On the query's device.
        """
        home, device = query.device, self.bank.device
        self._worker.wait()
        with _plain(device):
            query, admissible = query.detach().float().to(device), self.bank.admissible(step)
            nearest = self.retrieval.whole.search(
                query, ids.to(device), k, admissible=admissible & self.ready()
            )
        missing = max(0, k - nearest.slots.shape[1])
        rows = torch.nn.functional.pad(self.bank.ids_of(nearest.slots), (0, missing), value=-1)
        similarity = torch.nn.functional.pad(nearest.similarity, (0, missing), value=-torch.inf)
        return rows.to(home), similarity.to(home)

    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> None:
        """Store the keys of optimizer step ``step``; rows that are not finite are refused and counted.

        With ``mining.query=stored`` this also starts the look-ups of step ``step + lag``; with
        ``mining.overlap`` the worker updates the index and looks up; the bank itself is written here.

        Raises:
            Exception: raised by the worker's last job, with its own traceback.
        """
        self._worker.wait()
        self._step = step
        if self._ahead is not None:
            self._ahead.forget(step)
        slots = self.bank.write(keys, ids, step)
        # Asked here: the ranks of a sharded bank ask together, which two threads would not.
        mined = self.depth > 0 and self.ready()
        self._worker.submit(partial(self._after_write, slots, step, mined))

    def ready(self) -> bool:
        """Return whether the bank is filled to ``min_fill``. A device sync at each call until it is."""
        if not self._ready:
            self._ready = self.config.min_fill == 0 or self.bank.fill().item() >= self.config.min_fill
        return self._ready

    def metrics(self) -> Metrics:
        """Return ``mining/...`` of this rank's last ``negatives``, and ``bank/...``. Waits for the worker."""
        self._worker.wait()
        metrics = bank_metrics(self.bank, self._step) | self.retrieval.metrics()
        return metrics if self._stats is None else metrics | mining_metrics(self._stats, self.bank)

    def dropped(self) -> dict[str, Tensor]:
        """Return the share of the admissible rows that each filter removed in the last ``negatives``."""
        return {} if self._stats is None else self._stats.dropped

    def describe(self) -> str:
        """Describe bank and backend in one line, for the log."""
        return f"{self.bank.kind} bank of {self.bank.capacity} x {self.bank.dim}; {self.retrieval.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later steps depend on; save it before the next write changes its tensors."""
        self._worker.wait()
        state = {
            "bank": self.bank.state_dict(),
            "retrieval": self.retrieval.state_dict(),
            "backend": self.retrieval.describe(),  # for readers of the file; nothing depends on it
        }
        return state if self._ahead is None else state | {"issued": self._ahead.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: the state is of another bank.
        """
        self._worker.wait()
        self.bank.load_state_dict(state["bank"])
        self.retrieval.load_state_dict(state["retrieval"])
        if self._ahead is not None:
            self._ahead.load_state_dict(state.get("issued", {}))
        self._ready = False

    def close(self) -> None:
        """End the background threads; the miner cannot be used afterwards."""
        self.retrieval.close()
        self._worker.close()

    def _after_write(self, slots: Tensor, step: int, mined: bool) -> None:
        """Update the index and, if the bank is mined, measure recall and look up the coming step.

        Runs on the worker.
        """
        with _plain(self.bank.device):
            self.retrieval.update(slots)
            self.retrieval.advance(step)
            if not mined:
                return
            every = self.config.recall_every
            if self.retrieval.approximate and every and step % every == 0:
                checked = self.bank.share(slots[:_CHECKED])
                ids, admissible = self.bank.ids_of(checked), self.bank.admissible(step)
                k = min(self.depth, _CHECKED_RANKS)
                self.retrieval.check(self.bank.read(checked), ids, k, admissible, step)
            if self._ahead is not None:
                self._ahead.issue(step + self.config.lag)

    def _look_up(
        self, batch: MiningBatch, admissible: Bool[Tensor, " n"], ceiling: Float[Tensor, " b"] | None = None
    ) -> Candidates:
        """Search for ``batch``, or return what was looked up ahead of its step; see methods.base.LookUp."""
        if self._ahead is None:
            return self._search(batch.query, batch.ids, batch.step, admissible, ceiling)
        if batch.step not in self._ahead:
            self._worker.wait()
        return self._ahead.candidates(batch.query, batch.ids, batch.step, admissible)

    def _search_stored(self, query: Tensor, ids: Tensor, step: int) -> Candidates:
        # Keys that will be too old at ``step`` are useless, so age is counted at that step.
        return self._search(query, ids, step, self.bank.admissible(step))

    def _search(
        self, query: Tensor, ids: Tensor, step: int, admissible: Tensor, ceiling: Tensor | None = None
    ) -> Candidates:
        if self.depth == 0:
            rows = self.bank.count(admissible) - self.bank.num_own(admissible, ids)
            return Candidates.none(query, rows)
        return self.retrieval.search(
            query,
            ids,
            self.depth,
            admissible=admissible,
            ceiling=ceiling,
            key=mix(self.seed, step, _SEARCH),
        )


def build_miner(
    bank: BankConfig,
    mining: MiningConfig,
    *,
    rows: int,
    dim: int,
    seed: int,
    device: torch.device,
    upcoming: Callable[[int], Tensor | None] | None = None,
    exchange: Exchange | None = None,
    method: MiningMethod | None = None,
) -> Miner:
    """Build a miner for a dataset of ``rows``, embeddings of ``dim`` and a model on ``device``.

    Args:
        bank: Settings of the bank.
        mining: Settings of the miner.
        rows: Rows of the dataset; ids are below it.
        dim: Embedding dimension.
        seed: Decides every draw, together with step and id.
        device: Device of the model.
        upcoming: Returns the dataset rows of a coming optimizer step, None past the end; needed for
            ``mining.query=stored``.
        exchange: Communication with the other ranks, for ``bank.placement=sharded``. That makes
            ``negatives``, ``nearest``, ``write``, ``metrics``, ``state_dict`` and ``ready`` collective: all
            ranks call them, in the same order.
        method: A mining method of your own (memory_bank/methods/base.py); None is the one that
            ``mining.method`` names.

    Raises:
        ValueError: settings that cannot be combined; the message says what to change.
    """
    method = method or method_of(mining)
    ahead = mining.query == "stored"
    if ahead and (upcoming is None or bank.kind == "queue"):
        raise ValueError(
            "mining.query=stored looks up the rows of coming steps with their stored keys: it needs "
            "bank.kind=dataset and the plan's rows (argument upcoming); else use mining.query=fresh"
        )
    storage: Bank
    if bank.placement == "sharded":
        storage, retrieval = build_sharded(
            bank, mining, method, exchange, rows=rows, dim=dim, seed=seed, device=device
        )
    else:
        storage = build_storage(bank, rows=rows, dim=dim, device=device)
        retrieval = choose_backend(mining, storage, seed=seed, method=method)
    return Miner(storage, retrieval, mining, seed=seed, upcoming=upcoming if ahead else None, method=method)


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Switch off gradients and autocast: similarities are compared in float32."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield

"""The miner: a bank, a way to search it, and a policy, behind two calls a step."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank import policy
from memory_bank.bank import Bank
from memory_bank.choose import choose
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.draw import mix
from memory_bank.full_bank import tail_log_weight
from memory_bank.lookahead import LookAhead
from memory_bank.metrics import Metrics, Mined, bank_metrics, mining_metrics
from memory_bank.negatives import Negatives, unless
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.sharded import Exchange, build_sharded
from memory_bank.storage import build_storage
from memory_bank.worker import Inline, Worker

# Queries whose similarities are kept for the metrics where every row is a negative.
_SHOWN = 32
# Queries of a recall check, and the ranks that it looks at.
_CHECKED, _CHECKED_RANKS = 64, 256


class Miner:
    """Finds each query's negatives in the bank, and keeps the bank.

    Once a step: ``negatives`` (several times with accumulation), then, after the optimizer step, ``write``.
    A key is thus never its own negative. Everything here is detached and, where the bank lives on the
    queries' device and is searched there, runs without waiting for it.
    """

    def __init__(
        self,
        bank: Bank,
        retrieval: Retrieval,
        config: MiningConfig,
        *,
        seed: int,
        upcoming: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        self.bank, self.retrieval, self.config, self.seed = bank, retrieval, config, seed
        self._ready = False
        self._mined: Mined | None = None
        self._step = 0
        self._ahead = None if upcoming is None else LookAhead(bank, self._search_stored, upcoming)
        self._worker = Worker(bank.device) if config.overlap else Inline()
        depth = policy.depth(config, retrieval.size or bank.capacity)
        # Where the margin is applied after the search, what it drops must be looked up on top.
        late = self._ahead is not None or not retrieval.hides_above or config.false_negative == "attract"
        self._depth = 2 * depth if late and config.relative_margin is not None else depth

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
        """What each query is pushed away from; never a row of its own id.

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
        home, place = query.device, self.bank.device
        query, key, ids = query.detach().float().to(place), key.detach().float().to(place), ids.to(place)
        batch_keys = key if batch_keys is None else batch_keys.detach().float().to(place)
        batch_ids = ids if batch_ids is None else batch_ids.to(place)
        self._step = step
        with _plain(place):
            if not self.ready():
                found = self._in_batch(query, key, ids, batch_keys, batch_ids, step)
            elif self.config.method == "ranked":
                found = self._ranked(query, key, ids, batch_keys, batch_ids, step)
            else:
                found = self._every_row(query, key, ids, batch_keys, batch_ids, step)
        return found.to(home)

    def nearest(
        self, query: Float[Tensor, "b d"], ids: Int[Tensor, " b"], step: int, k: int
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
        """The ``k`` closest rows of each query, for galleries and nearest-neighbour positives.

        Args:
            query: Unit rows.
            ids: Rows left out for each query; -1 for a query from outside.
            step: Decides which keys are too old.
            k: How many.

        Returns:
            ids, similarity: Closest first; -1 and -inf where there are fewer, and for all until the bank is
                filled to ``min_fill``: an index is trained at its first look-up. On the query's device.
        """
        home, place = query.device, self.bank.device
        self._worker.wait()
        with _plain(place):
            query, admissible = query.detach().float().to(place), self.bank.admissible(step)
            found = self.retrieval.whole.search(query, ids.to(place), k, admissible=admissible & self.ready())
        missing = max(0, k - found.slots.shape[1])
        rows = torch.nn.functional.pad(self.bank.ids_of(found.slots), (0, missing), value=-1)
        return rows.to(home), torch.nn.functional.pad(found.similarity, (0, missing), value=-torch.inf).to(
            home
        )

    def write(self, keys: Float[Tensor, "g d"], ids: Int[Tensor, " g"], step: int) -> None:
        """Store the keys of optimizer step ``step``; rows that are not finite are refused and counted.

        With ``mining.query=stored`` this also starts the look-ups of step ``step + lag``; with
        ``mining.overlap`` index and look-ups are left to the worker, the bank itself is written here.

        Raises:
            Exception: whatever the worker's last job raised, with its own traceback.
        """
        self._worker.wait()
        self._step = step
        if self._ahead is not None:
            self._ahead.forget(step)
        slots = self.bank.write(keys, ids, step)
        self._worker.submit(partial(self._after_write, slots, step))

    def ready(self) -> bool:
        """Whether the bank is filled to ``min_fill``. Waits for the device, until it is."""
        if not self._ready:
            self._ready = self.config.min_fill == 0 or self.bank.fill().item() >= self.config.min_fill
        return self._ready

    def metrics(self) -> Metrics:
        """``mining/...`` of the last ``negatives`` and ``bank/...``. Waits for the worker."""
        self._worker.wait()
        found = bank_metrics(self.bank, self._step) | self.retrieval.metrics()
        return found if self._mined is None else found | mining_metrics(self._mined, self.bank)

    def describe(self) -> str:
        """Bank and backend in one line, for the log."""
        return f"{self.bank.kind} bank of {self.bank.capacity} x {self.bank.dim}; {self.retrieval.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; tensors are the bank's own: save them before the next write."""
        self._worker.wait()
        state = {
            "bank": self.bank.state_dict(),
            "retrieval": self.retrieval.state_dict(),
            "backend": self.retrieval.describe(),  # for who reads the file; nothing depends on it
        }
        return state if self._ahead is None else state | {"issued": self._ahead.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

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
        """End what runs in the background; no use of the miner afterwards."""
        self.retrieval.close()
        self._worker.close()

    def _after_write(self, slots: Tensor, step: int) -> None:
        """What the worker may do: the index, its recall, and the look-ups of the step to come."""
        with _plain(self.bank.device):
            self.retrieval.update(slots)
            self.retrieval.advance(step)
            if self.config.method == "all_rows" or not self.ready():
                return
            every = self.config.recall_every
            if self.retrieval.approximate and every and step % every == 0:
                some = slots[:_CHECKED]
                ids, admissible = self.bank.ids_of(some), self.bank.admissible(step)
                k = min(self._depth, _CHECKED_RANKS)
                self.retrieval.check(self.bank.read(some), ids, k, admissible, step)
            if self._ahead is not None:
                self._ahead.issue(step + self.config.lag)

    def _search_stored(self, query: Tensor, ids: Tensor, step: int) -> Candidates:
        # Keys that will be too old by ``step`` are of no use, so age is seen from there.
        return self._search(query, ids, self._depth, step, self.bank.admissible(step))

    def _look_up(
        self,
        query: Tensor,
        ids: Tensor,
        step: int,
        admissible: Bool[Tensor, " n"],
        ceiling: Tensor | None = None,
    ) -> Candidates:
        """The policy's candidates, by either kind of query."""
        if self._ahead is None:
            return self._search(query, ids, self._depth, step, admissible, ceiling)
        if step not in self._ahead:
            self._worker.wait()
        return self._ahead.candidates(query, ids, step, admissible)

    def _search(
        self,
        query: Tensor,
        ids: Tensor,
        k: int,
        step: int,
        admissible: Bool[Tensor, " n"],
        ceiling: Tensor | None = None,
    ) -> Candidates:
        return self.retrieval.search(
            query, ids, k, admissible=admissible, ceiling=ceiling, key=mix(self.seed, step, 1)
        )

    def _in_batch(
        self, query: Tensor, key: Tensor, ids: Tensor, batch_keys: Tensor, batch_ids: Tensor, step: int
    ) -> Negatives:
        """The other keys of the batch, for all queries."""
        log_weight = unless(batch_ids[None] == ids[:, None])
        self._note(query, key, batch_keys, log_weight, step)
        return Negatives.none(query).with_shared(batch_keys, batch_ids, log_weight)

    def _ranked(
        self, query: Tensor, key: Tensor, ids: Tensor, batch_keys: Tensor, batch_ids: Tensor, step: int
    ) -> Negatives:
        """``num_hard`` of each query's band, ``num_uniform`` shared."""
        config, bank = self.config, self.bank
        admissible = bank.admissible(step)
        positive = (query * key).sum(1)
        limit = policy.ceiling(config, positive)
        # What is attracted must be seen first, so there the policy applies the margin by itself.
        hidden = None if config.false_negative == "attract" else limit
        found = self._look_up(query, ids, step, admissible, hidden)
        chosen = policy.select(found, positive, ids, config, step=step, key=mix(self.seed, step, 2))

        slots, index = _distinct(chosen.slots)
        drawn = bank.draw(admissible, config.num_uniform, mix(self.seed, step, 3))
        shared, shared_ids = bank.read(drawn), bank.ids_of(drawn)
        similarity = query @ shared.T
        excluded = (drawn < 0)[None] | (shared_ids[None] == ids[:, None])
        excluded |= policy.contains(slots, index, drawn) | (similarity >= chosen.floor[:, None])
        if limit is not None:
            excluded |= similarity > limit[:, None]
        self._mined = Mined(positive, chosen.similarity, chosen.slots, step, chosen.dropped)
        negatives = Negatives(
            **self._hard(slots, index),
            shared=shared,
            shared_log_weight=unless(excluded),
            shared_ids=shared_ids,
            extra_positives=query.new_zeros(len(query), 0, bank.dim),
            extra_positive_weight=query.new_zeros(len(query), 0),
        )
        if config.false_negative == "attract":
            negatives.extra_positives = bank.read(chosen.alike)
            negatives.extra_positive_weight = policy.attract_weight(chosen.alike)
        return self._with_batch(negatives, ids, batch_keys, batch_ids, found.rows == 0)

    def _with_batch(
        self, negatives: Negatives, ids: Tensor, batch_keys: Tensor, batch_ids: Tensor, unserved: Tensor
    ) -> Negatives:
        """The batch's keys as negatives of the queries that the bank could not serve."""
        if self.bank.max_age is None and self._ahead is None:
            return negatives
        log_weight = unless((batch_ids[None] == ids[:, None]) | ~unserved[:, None])
        return negatives.with_shared(batch_keys, batch_ids, log_weight)

    def _every_row(
        self, query: Tensor, key: Tensor, ids: Tensor, batch_keys: Tensor, batch_ids: Tensor, step: int
    ) -> Negatives:
        """All rows, or an estimate of their sum; the batch's keys stand for their own stale slots."""
        bank, estimated = self.bank, self.config.method == "full_bank"
        rest = bank.without(bank.admissible(step), batch_ids)
        fresh = unless(batch_ids[None] == ids[:, None])
        if estimated:
            near = self._look_up(query, ids, step, rest)
            slots, index = _distinct(near.slots)
            drawn = bank.draw(rest, self.config.num_uniform, mix(self.seed, step, 3))
            own = bank.ids_of(drawn)[None] == ids[:, None]
            # Counted here: what the look-up counted may be a sample's rows, or those of an earlier step.
            total = bank.count(rest) - bank.num_own(rest, ids)
            log_weight = tail_log_weight(
                drawn, own | policy.contains(slots, index, drawn), total - (near.slots >= 0).sum(1)
            )
            rows, row_ids = bank.read(drawn), bank.ids_of(drawn)
        else:
            rows, row_ids = bank.key.float(), bank.id
            log_weight = unless(~rest[None] | (row_ids[None] == ids[:, None]))
        negatives = Negatives.none(query).with_shared(
            torch.cat([rows, batch_keys]), torch.cat([row_ids, batch_ids]), torch.cat([log_weight, fresh], 1)
        )
        if not estimated:
            self._note(query, key, negatives.shared, negatives.shared_log_weight, step)
            return negatives
        self._mined = Mined((query * key).sum(1), near.similarity, near.slots, step)
        return dataclasses.replace(negatives, **self._hard(slots, index))

    def _hard(self, slots: Int[Tensor, " u"], index: Int[Tensor, "b k"]) -> dict[str, Tensor]:
        """The fields of ``Negatives`` for each query's own ``slots[index]``; -1 is none."""
        return {
            "hard": self.bank.read(slots),
            "hard_index": index,
            "hard_log_weight": unless(slots < 0)[index],
            "hard_ids": self.bank.ids_of(slots)[index],
        }

    def _note(self, query: Tensor, key: Tensor, shared: Tensor, log_weight: Tensor, step: int) -> None:
        """Keep for the metrics what a few queries see, where negatives are not listed per query."""
        similarity = query[:_SHOWN] @ shared.T
        similarity = similarity.masked_fill(log_weight[:_SHOWN] == -torch.inf, -torch.inf)
        slots = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
        self._mined = Mined((query * key).sum(1), similarity, slots, step)


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
) -> Miner:
    """A miner for a dataset of ``rows``, embeddings of ``dim``, a model on ``device``.

    Args:
        bank: Where keys are kept.
        mining: Which of them become negatives.
        rows: Rows of the dataset; ids are below it.
        dim: Embedding dimension.
        seed: Decides every draw, together with step and id.
        device: The model's.
        upcoming: Dataset rows of an optimizer step to come, None past the end; for ``mining.query=stored``.
        exchange: To the other ranks; for ``bank.placement=sharded``, which makes ``negatives``, ``nearest``,
            ``write``, ``state_dict`` and ``ready`` collective: all ranks call them, in the same order.

    Raises:
        ValueError: settings that do not go together; the message says what to change.
    """
    ahead = mining.query == "stored"
    if ahead and (upcoming is None or bank.kind != "dataset"):
        raise ValueError(
            "mining.query=stored looks up the rows of coming steps with their stored keys: it needs "
            "bank.kind=dataset and the plan's rows (argument upcoming); else use mining.query=fresh"
        )
    storage: Bank
    if bank.placement == "sharded":
        storage, retrieval = build_sharded(bank, mining, exchange, rows=rows, dim=dim, device=device)
    else:
        storage = build_storage(bank, rows=rows, dim=dim, device=device)
        retrieval = choose(mining, storage, seed=seed)
    return Miner(storage, retrieval, mining, seed=seed, upcoming=upcoming if ahead else None)


def _distinct(slots: Int[Tensor, "b k"]) -> tuple[Int[Tensor, " u"], Int[Tensor, "b k"]]:
    """Slots, and the place of each query's own among them; each once where to count them is no wait."""
    if slots.device.type == "cpu":
        # It sorts, which takes half as long in int32.
        different, index = torch.unique(slots.int(), return_inverse=True)
        return different.long(), index
    return slots.flatten(), torch.arange(slots.numel(), device=slots.device).view_as(slots)


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 also where the caller is under autocast: similarities are compared."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield

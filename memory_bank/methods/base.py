"""Define the interface of a mining method, its input and output, and helpers that methods share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.config import SELECTION, MiningConfig
from memory_bank.draw import mix
from memory_bank.metrics import LookupStats
from memory_bank.negatives import Negatives, log_mask
from memory_bank.registry import METHODS
from memory_bank.retrieval.base import Candidates


@dataclass(frozen=True)
class MiningBatch:
    """Queries of one call of ``Miner.negatives``, and the keys of their batch.

    Tensors are detached, in float32 or int64, and on the bank's device.

    Attributes:
        query: Unit rows.
        key: The queries' positives, unit rows.
        ids: Dataset rows of the queries.
        batch_keys: Keys of the whole batch over all ranks.
        batch_ids: Their dataset rows.
        step: The optimizer step.
        seed: Seed of the miner; see ``draw_key``.
    """

    query: Float[Tensor, "b d"]
    key: Float[Tensor, "b d"]
    ids: Int[Tensor, " b"]
    batch_keys: Float[Tensor, "g d"]
    batch_ids: Int[Tensor, " g"]
    step: int
    seed: int

    @property
    def positive(self) -> Float[Tensor, " b"]:
        """Similarity of each query with its own key."""
        return (self.query * self.key).sum(1)

    @property
    def own_in_batch(self) -> Bool[Tensor, "b g"]:
        """True where a key of the batch is of the query's own row."""
        return self.batch_ids[None] == self.ids[:, None]

    def draw_key(self, purpose: int) -> int:
        """Return the key of this step's random draw for ``purpose``; the search uses purpose 1."""
        return mix(self.seed, self.step, purpose)


@dataclass(frozen=True)
class Mined:
    """Negatives of a ``MiningBatch``, and statistics of them for the metrics ``mining/...``.

    Attributes:
        negatives: Negatives, on the bank's device.
        stats: Statistics of the look-up; None computes the similarities of a few queries to their negatives.
    """

    negatives: Negatives
    stats: LookupStats | None = None


@runtime_checkable
class LookUp(Protocol):
    """Search the bank for one ``MiningBatch``, with the fresh or the stored query (``mining.query``)."""

    def __call__(
        self, admissible: Bool[Tensor, " n"], ceiling: Float[Tensor, " b"] | None = None
    ) -> Candidates:
        """Return the closest ``admissible`` rows of each query, ``MiningMethod.depth`` or more if possible.

        Args:
            admissible: Slots that may be returned.
            ceiling: Rows more similar than this may be left out, and are then counted (``Candidates.above``).
        """


class MiningMethod(ABC):
    """A way to turn rows of the bank into negatives.

    Attributes:
        uses_bank: Whether negatives come from the bank. If not, an empty bank is no fault.
        reads_every_row: Whether it reads ``bank.key`` and ``bank.id`` as those of all slots, which no rank of
            a sharded bank has; such a method is refused there. ``bank.every_row`` works everywhere.
        gathers_every_row: Whether it calls ``bank.every_row``, which sends all rows to each rank of a sharded
            bank, in each step.
        reads: Settings of ``MiningConfig`` that it reads, besides ``method`` and those of the search; all by
            default. Training warns of others that are set.
    """

    uses_bank = True
    reads_every_row = False
    gathers_every_row = False
    reads: ClassVar[frozenset[str]] = SELECTION

    @abstractmethod
    def negatives(self, batch: MiningBatch, bank: Bank, look_up: LookUp, config: MiningConfig) -> Mined:
        """Find the negatives of each query; never a row of its own id.

        Args:
            batch: Queries, and the keys of their batch.
            bank: The bank, to be read only. It is filled to ``mining.min_fill``.
            look_up: Function that searches the bank.
            config: The settings.
        """

    def depth(self, config: MiningConfig, rows: int) -> int:
        """Return how many of the closest of ``rows`` rows a look-up must return, at any step.

        0: nothing is searched or looked up ahead of a step, and the backend only serves galleries.
        """
        return min(rows, config.num_hard)


def method_of(config: MiningConfig) -> MiningMethod:
    """Make the method that ``mining.method`` names."""
    method: MiningMethod = METHODS[config.method]()
    return method


def distinct(slots: Int[Tensor, "b k"]) -> tuple[Int[Tensor, " u"], Int[Tensor, "b k"]]:
    """Return the slots, each once, and the index of each query's slots among them.

    Only a CPU removes repeated slots: on a GPU the host would have to wait for their number.
    """
    if slots.device.type == "cpu":
        # unique() sorts, which takes half as long in int32.
        different, index = torch.unique(slots.int(), return_inverse=True)
        return different.long(), index
    return slots.flatten(), torch.arange(slots.numel(), device=slots.device).view_as(slots)


def with_hard(
    negatives: Negatives, bank: Bank, slots: Int[Tensor, " u"], index: Int[Tensor, "b k"]
) -> Negatives:
    """Return ``negatives`` with the rows in ``slots[index]`` as each query's own; -1 is none."""
    return replace(
        negatives,
        hard=bank.read(slots),
        hard_index=index,
        hard_log_weight=log_mask(slots < 0)[index],
        hard_ids=bank.ids_of(slots)[index],
    )


def with_fresh_batch(
    batch: MiningBatch,
    rows: Float[Tensor, "m d"],
    row_ids: Int[Tensor, " m"],
    log_weight: Float[Tensor, "b m"],
) -> Negatives:
    """Share ``rows`` and the batch's keys, which stand for their own stale slots, with all queries."""
    return Negatives.none(batch.query).with_shared(
        torch.cat([rows, batch.batch_keys]),
        torch.cat([row_ids, batch.batch_ids]),
        torch.cat([log_weight, log_mask(batch.own_in_batch)], 1),
    )

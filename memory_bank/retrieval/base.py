"""Define the interface of a search backend, and the candidates it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.storage import Storage


@dataclass
class Candidates:
    """Closest rows found for each query, closest first; never a query's own row, never one that is too old.

    Similarities are those of the *stored* keys, whatever an index approximates.

    Attributes:
        slots: Slots of the bank, -1 where fewer were found; those come last.
        similarity: Inner products, -inf for -1.
        rows: Number of rows that were examined and admissible for the query.
        above: Number of admissible rows above the ceiling that were left out of ``slots``.
        share: Rows examined as a share of the bank: 1, or less for a sample.
    """

    slots: Int[Tensor, "b k"]
    similarity: Float[Tensor, "b k"]
    rows: Int[Tensor, " b"]
    above: Int[Tensor, " b"]
    share: float

    @classmethod
    def none(cls, query: Float[Tensor, "b d"], rows: Int[Tensor, " b"]) -> "Candidates":
        """Return no candidates of ``rows`` rows that could have been searched for each query."""
        slots = rows.new_zeros(len(rows), 0)
        return cls(slots, query.new_zeros(slots.shape), rows, torch.zeros_like(rows), share=1.0)


@dataclass(frozen=True)
class SearchSpec:
    """Collect what a search backend is built from.

    Attributes:
        bank: The bank; ``part`` are the slots of it that this process holds.
        config: The settings.
        depth: Deepest rank that a look-up will ask for.
        sample: Rows of a sample whose narrowest band holds ``num_hard`` rows.
        seed: Decides the training of an index.
        spread: Makes a search of the whole bank of a search of ``part``: as it is, in one process.
        reason: Why the backend was chosen, for ``Retrieval.describe``; empty if it was asked for.
    """

    bank: Bank
    config: MiningConfig
    depth: int
    sample: int
    seed: int
    spread: Callable[["Retrieval"], "Retrieval"]
    reason: str = ""

    @property
    def part(self) -> Storage:
        """Return the slots that this process holds."""
        assert isinstance(self.bank.local, Storage)
        return self.bank.local


class Retrieval(ABC):
    """Search one bank; not thread-safe. Hooks that only approximate backends need do nothing by default.

    Attributes:
        hides_above: Whether ``search`` leaves out and counts rows above ``ceiling``.
        approximate: Whether rows may be missed, so that recall is worth measuring.
        size: Rows that a search examines; None is the whole bank.
    """

    hides_above = False
    approximate = False
    size: int | None = None

    @abstractmethod
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
        """Return the ``k`` closest admissible rows of each query, on the bank's device.

        Args:
            query: Float32 unit rows on the bank's device.
            ids: The queries' own rows, which are left out; -1 for a query from outside.
            k: Any number; fewer are returned if there are fewer.
            admissible: Slots that may be returned.
            ceiling: Rows more similar than this may be left out, and are then counted (hides_above).
            key: Decides the sample, where the backend draws one (draw.mix of seed and step).
        """

    @property
    def whole(self) -> "Retrieval":
        """Return the backend that examines every row, used to find the closest rows."""
        return self

    @abstractmethod
    def describe(self) -> str:
        """Describe the backend and why it was chosen, in one line for the log."""

    def index_bytes(self, rows: int) -> int:
        """Return the bytes that an index of ``rows`` rows takes beside the bank, estimated."""
        return 0

    def update(self, slots: Int[Tensor, " g"]) -> None:  # noqa: B027 - a default
        """Update the index with the new keys in ``slots`` (-1 is skipped, repeats are allowed)."""

    def check(  # noqa: B027 - a default
        self,
        query: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        k: int,
        admissible: Bool[Tensor, " n"],
        step: int,
    ) -> None:
        """Measure recall and act on it, if the backend is approximate."""

    def act_on_recall(self, neighbours: Int[Tensor, "2"], k: int, step: int) -> None:  # noqa: B027 - a default
        """Act on the recall@k that was measured over all processes, as ``check`` does.

        Args:
            neighbours: How many true neighbours were found, and how many there are.
            k: Neighbours of each query.
            step: The optimizer step.
        """

    def advance(self, step: int) -> None:  # noqa: B027 - a default
        """Start to use what was prepared in the background for ``step``; its keys are written."""

    def metrics(self) -> dict[str, float]:
        """Return values to log, by metric name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that cannot be derived from the bank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a default
        """Restore the state; the bank is already loaded."""

    def close(self) -> None:  # noqa: B027 - a default
        """End background threads."""


def refine(
    bank: Bank,
    query: Float[Tensor, "b d"],
    ids: Int[Tensor, " b"],
    slots: Int[Tensor, "b c"],
    admissible: Bool[Tensor, " n"],
    k: int,
) -> tuple[Int[Tensor, "b k2"], Float[Tensor, "b k2"]]:
    """Score candidate slots by their stored keys, drop inadmissible and own rows, keep the ``k`` closest.

    Returns:
        slots, similarity: As in Candidates, min(c, k) wide.
    """
    similarity = bank.score(query, slots, admissible)
    similarity = similarity.masked_fill(bank.ids_of(slots) == ids[:, None], -torch.inf)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    slots = slots.gather(1, order)[:, :k]
    similarity = similarity[:, :k]
    return slots.masked_fill(similarity == -torch.inf, -1), similarity

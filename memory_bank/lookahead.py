"""Look up batches ahead of their step, with the stored keys of their images (``mining.query=stored``)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.retrieval.base import Candidates, refine
from memory_bank.transfer import to_device


@dataclass
class Issued:
    """Hold a look-up made ahead of its step: its slots; similarities are computed later with the fresh query.

    Attributes:
        ids: Rows looked up, ascending.
        slots: Candidates of each, -1 where there are fewer; all -1 for a row without a stored key.
        rows: As in Candidates; 0 for a row without a stored key.
        share: As in Candidates.
    """

    ids: Int[Tensor, " g"]
    slots: Int[Tensor, "g k"]
    rows: Int[Tensor, " g"]
    share: float


class LookAhead:
    """Issue look-ups ``lag`` steps ahead and return them at their step.

    Stale keys, and rows that were written since, cost recall and nothing else: candidates are scored again
    with the fresh query, and those that are no longer admissible are dropped.
    """

    def __init__(
        self,
        bank: Bank,
        search: Callable[[Tensor, Tensor, int], Candidates],
        upcoming: Callable[[int], Tensor | None],
    ) -> None:
        self._bank, self._search, self._upcoming = bank, search, upcoming
        self._issued: dict[int, Issued] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._issued

    def issue(self, step: int) -> None:
        """Look up the rows of the coming step ``step``; nothing past the end of the plan."""
        ids = self._upcoming(step)
        if ids is not None and len(ids):
            bank = self._bank
            mine = self.look_up(bank.share(to_device(ids, bank.device).sort().values), step)
            ids, slots, rows = (bank.joined(values) for values in (mine.ids, mine.slots, mine.rows))
            self._issued[step] = Issued(ids, slots, rows, mine.share)

    def look_up(self, ids: Int[Tensor, " g"], step: int) -> Issued:
        """Search with the stored keys of ``ids``."""
        ids = ids.sort().values
        slots = self._bank.slots_of(ids)
        unknown = slots < 0
        candidates = self._search(self._bank.read(slots), ids, step)
        return Issued(
            ids,
            candidates.slots.masked_fill(unknown[:, None], -1),
            candidates.rows.masked_fill(unknown, 0),
            candidates.share,
        )

    def candidates(
        self, query: Float[Tensor, "b d"], ids: Int[Tensor, " b"], step: int, admissible: Bool[Tensor, " n"]
    ) -> Candidates:
        """Return the candidates of ``ids``, scored with ``query``; looks up now if nothing was issued."""
        issued = self._issued[step] if step in self._issued else self.look_up(ids, step)
        position = torch.searchsorted(issued.ids, ids).clamp_max(max(0, len(issued.ids) - 1))
        unknown = issued.ids[position] != ids
        slots = issued.slots[position].masked_fill(unknown[:, None], -1)
        slots, similarity = refine(self._bank, query, ids, slots, admissible, slots.shape[1])
        rows = issued.rows[position]
        if issued.share == 1:
            rows = torch.where(
                rows > 0, self._bank.count(admissible) - self._bank.num_own(admissible, ids), 0
            )
        rows = rows.masked_fill(unknown, 0)
        return Candidates(slots, similarity, rows, torch.zeros_like(ids), issued.share)

    def forget(self, step: int) -> None:
        """Drop what was issued up to ``step``."""
        self._issued = {at: issued for at, issued in self._issued.items() if at > step}

    def state_dict(self) -> dict[str, Any]:
        """Return the look-ups that were issued and not used yet."""
        return {str(step): vars(issued) for step, issued in self._issued.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the look-ups."""
        device = self._bank.device
        self._issued = {
            int(step): Issued(
                saved["ids"].to(device),
                saved["slots"].to(device),
                saved["rows"].to(device),
                float(saved["share"]),
            )
            for step, saved in state.items()
        }

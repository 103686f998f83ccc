"""FAISS's exact search. It needs float32 rows, so it holds a copy of the bank beside the stored one."""

from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memory_bank.retrieval.base import Candidates, Retrieval, refine
from memory_bank.storage import Storage

# Queries from which FAISS multiplies matrices instead of looping; its own default of 128000 leaves that to
# the loop always, measured 14 times slower for 256 queries.
_BLAS_FROM = 20


class Flat(Retrieval):
    """Exact, on the CPU. Rows that are not admissible are left out before the search."""

    def __init__(self, bank: Storage, reason: str = "") -> None:
        self._bank, self._reason = bank, reason
        self._rows = np.zeros((bank.capacity, bank.dim), np.float32)

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
        """See Retrieval.search; ``ceiling`` is left to the caller."""
        bank = self._bank
        allowed = admissible.cpu().numpy()
        own = bank.num_own(admissible, ids)
        # Own rows are dropped after the search: FAISS's selectors hold for all queries alike.
        wanted = min(k + int(own.max()), int(allowed.sum())) if len(query) else 0
        if wanted == 0:
            slots = ids.new_full((len(ids), min(k, bank.capacity)), -1)
            similarity = query.new_full(slots.shape, -torch.inf)
        else:
            found = torch.from_numpy(self._nearest(query, allowed, wanted)).to(bank.device)
            slots, similarity = refine(bank, query, ids, found, admissible, k)
        return Candidates(slots, similarity, admissible.sum() - own, torch.zeros_like(ids), share=1.0)

    def update(self, slots: Int[Tensor, " g"]) -> None:
        """Copy the new keys."""
        slots = slots[slots >= 0]
        self._rows[slots.cpu().numpy()] = self._bank.read(slots).cpu().numpy()

    def describe(self) -> str:
        """One line for the log."""
        return f"FAISS flat search of {self._bank.capacity} rows, exact, on the CPU{self._reason}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy all rows from the bank, which is already loaded."""
        self._rows[:] = self._bank.key.float().cpu().numpy()

    def _nearest(self, query: Tensor, allowed: NDArray[np.bool_], k: int) -> NDArray[np.int64]:
        chosen = None if allowed.all() else np.flatnonzero(allowed)
        rows = self._rows if chosen is None else self._rows[chosen]
        faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM
        _, found = faiss.knn(query.cpu().numpy(), rows, k, metric=faiss.METRIC_INNER_PRODUCT)
        if chosen is None:
            return found
        return np.where(found < 0, -1, chosen[found])

"""Search exactly with FAISS, which needs a float32 copy of the bank."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from memory_bank.retrieval.base import Candidates, Retrieval, refine
from memory_bank.retrieval.inverted import faiss
from memory_bank.storage import Storage


class Flat(Retrieval):
    """Search all admissible rows on the CPU; the others are left out before the search."""

    def __init__(self, bank: Storage, reason: str = "") -> None:
        self._bank, self._reason = bank, reason
        self._rows = np.zeros((bank.capacity, bank.dim), np.float32)

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
        """Search the admissible rows; the caller applies ``ceiling``."""
        bank = self._bank
        allowed = admissible.cpu().numpy()
        own = bank.num_own(admissible, ids)
        # Own rows are dropped after the search: a FAISS selector is the same for all queries.
        wanted = min(k + int(own.max()), int(allowed.sum())) if len(query) else 0
        if wanted == 0:
            slots = ids.new_full((len(ids), min(k, bank.capacity)), -1)
            similarity = query.new_full(slots.shape, -torch.inf)
        else:
            nearest = torch.from_numpy(self._nearest(query, allowed, wanted)).to(bank.device)
            slots, similarity = refine(bank, query, ids, nearest, admissible, k)
        return Candidates(slots, similarity, admissible.sum() - own, torch.zeros_like(ids), share=1.0)

    @override
    def update(self, slots: Int[Tensor, " g"]) -> None:
        slots = slots[slots >= 0]
        self._rows[slots.cpu().numpy()] = self._bank.read(slots).cpu().numpy()

    @override
    def index_bytes(self, rows: int) -> int:
        return 4 * self._bank.dim * rows

    @override
    def describe(self) -> str:
        return f"FAISS flat search of {self._bank.capacity} rows, exact, on the CPU{self._reason}"

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows[:] = self._bank.key.float().cpu().numpy()

    def _nearest(self, query: Tensor, allowed: NDArray[np.bool_], k: int) -> NDArray[np.int64]:
        chosen = None if allowed.all() else np.flatnonzero(allowed)
        rows = self._rows if chosen is None else self._rows[chosen]
        nearest: NDArray[np.int64] = faiss.knn(
            query.cpu().numpy(), rows, k, metric=faiss.METRIC_INNER_PRODUCT
        )[1]
        if chosen is None:
            return nearest
        return np.where(nearest < 0, -1, chosen[nearest])

"""Search exactly with torch on any device: a matrix product and a top-k, piece by piece of the bank."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.draw import mix
from memory_bank.retrieval.base import Candidates, Retrieval, SearchSpec
from memory_bank.storage import Storage
from memory_bank.top import count, largest

# Similarities held at once: 128 MiB of float32. Larger pieces were not faster on the CPU.
_PIECE = 1 << 25


class Exact(Retrieval):
    """Score every row of the bank. The reference for the other backends."""

    hides_above = True

    def __init__(self, bank: Storage, reason: str = "") -> None:
        self._bank, self._reason = bank, reason

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
        bank, n = self._bank, self._bank.capacity
        width = max(1, min(n, _PIECE // max(1, len(query))))
        above = torch.zeros_like(ids)
        best, slots = query.new_zeros(len(query), 0), ids.new_zeros(len(query), 0)
        for start in range(0, n, width):
            similarity = query @ bank.key[start : start + width].float().T
            similarity.masked_fill_(~admissible[start : start + width], -torch.inf)
            bank.hide_own(similarity, ids, start)
            above += hide_above(similarity, ceiling)
            nearest, column = largest(similarity, min(k, similarity.shape[1]))
            best, slots = _merge(best, slots, nearest, column + start, k)
        slots = slots.masked_fill(best == -torch.inf, -1)
        rows = admissible.sum() - bank.num_own(admissible, ids)
        return Candidates(slots, best, rows, above, share=1.0)

    @override
    def describe(self) -> str:
        return f"exact search of {self._bank.capacity} rows on {self._bank.device}{self._reason}"


class Subsample(Retrieval):
    """Search exactly in a uniform sample of the bank, drawn for each search and shared by the queries.

    For bands too deep for a top-k: ranks 0.1% to 5% of 1.28 million rows end at rank 64,000. The sample's
    rows between two of *its* quantiles are a uniform draw from the bank's rows between the same quantiles
    (a sample quantile at level p of s rows is unbiased up to 1/s, with standard error
    sqrt(p (1 - p) / s) in level), which is what the policy draws from the band anyway.

    Args:
        whole: Backend that searches all rows for the closest ones, because a sample has few of them.
    """

    hides_above = True

    def __init__(self, bank: Bank, size: int, whole: Retrieval, reason: str = "") -> None:
        self._bank, self._whole, self._reason = bank, whole, reason
        self.size: int = min(size, bank.capacity)

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
        """Search the sample; ``rows`` and ``above`` count its rows."""
        bank = self._bank
        sample = bank.draw(admissible, self.size, mix(key, 0x5A))
        hidden = (sample < 0)[None] | (bank.ids_of(sample)[None] == ids[:, None])
        similarity = (query @ bank.read(sample).T).masked_fill_(hidden, -torch.inf)
        above = hide_above(similarity, ceiling)
        best, column = largest(similarity, min(k, self.size))
        slots = sample.take(column).masked_fill_(best == -torch.inf, -1)
        rows = self.size - count(hidden)
        return Candidates(slots, best, rows, above, share=self.size / bank.capacity)

    @property
    @override
    def whole(self) -> Retrieval:
        return self._whole

    @override
    def describe(self) -> str:
        return f"exact search in a sample of {self.size} of {self._bank.capacity} rows{self._reason}"


def build_exact(spec: SearchSpec) -> Retrieval:
    """Build the search of every row."""
    return spec.spread(Exact(spec.part, spec.reason))


def build_subsample(spec: SearchSpec) -> Retrieval:
    """Build the search of a sample, beside that of every row for the closest ones."""
    return Subsample(spec.bank, spec.sample, build_exact(replace(spec, reason="")), spec.reason)


def hide_above(similarity: Float[Tensor, "b c"], ceiling: Float[Tensor, " b"] | None) -> Int[Tensor, " b"]:
    """Set similarities above the ceiling to -inf, in place, and count them for each query."""
    if ceiling is None:
        return similarity.new_zeros(len(similarity), dtype=torch.int64)
    over = similarity > ceiling[:, None]
    similarity.masked_fill_(over, -torch.inf)
    return count(over)


def _merge(best: Tensor, slots: Tensor, more: Tensor, more_slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if not best.shape[1]:
        return more, more_slots
    best, slots = torch.cat([best, more], 1), torch.cat([slots, more_slots], 1)
    best, order = best.topk(min(k, best.shape[1]))
    return best, slots.gather(1, order)

"""Estimate the partition function of the whole bank from its largest terms and a weighted sample of the rest.

Let A be the rows admissible for a query q: valid, not too old, not q's own, and none of the batch's (their
fresh keys stand for them with weight 1). The sum wanted is Z = sum_{a in A} exp(q.a / T). Split A into R,
the rows that were retrieved for q, and the tail A \\ R. Draw U uniformly without replacement from the
admissible rows, once for the whole batch, and keep for q the m_q rows of U that lie in its tail. Given
m_q > 0 these are a uniform sample of the tail, so that

    Z' = sum_{r in R} exp(q.r / T)  +  (|A \\ R| / m_q) * sum_{u in U in tail} exp(q.u / T)

has E[Z' | m_q] = Z, whichever rows R holds: a look-up that misses a near row costs variance, not bias. Each
row is in one part only, so none counts twice; when U holds every row the estimate is the sum itself. The
log of Z', and so the loss and its gradient, are not unbiased (Jensen): log Z' is low by about
Var(Z') / (2 Z^2). U is shared, so the errors of one batch's queries are correlated.

Top-k plus a uniform tail: Rastogi, Van Durme 2015, "Sublinear partition estimation"; Mussmann, Levy, Ermon
2017, "Fast amortized inference and learning in log-linear models" (arXiv:1707.03372).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from memory_bank import policy
from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import (
    LookUp,
    Mined,
    MiningBatch,
    MiningMethod,
    distinct,
    with_fresh_batch,
    with_hard,
)
from memory_bank.metrics import LookupStats

# Purpose of the random draw.
_SHARED = 3


class FullBank(MiningMethod):
    """Retrieve the ``num_hard`` nearest rows (R), and draw ``num_uniform`` rows (U) to stand for the rest."""

    reads = frozenset({"num_hard", "num_uniform"})

    @override
    def negatives(self, batch: MiningBatch, bank: Bank, look_up: LookUp, config: MiningConfig) -> Mined:
        rest = bank.without(bank.admissible(batch.step), batch.batch_ids)
        near = look_up(rest)
        slots, index = distinct(near.slots)
        drawn = bank.draw(rest, config.num_uniform, batch.draw_key(_SHARED))
        drawn_ids = bank.ids_of(drawn)
        own = drawn_ids[None] == batch.ids[:, None]
        # Counted here: the look-up may have counted the rows of a sample, or those of an earlier step.
        total = bank.count(rest) - bank.num_own(rest, batch.ids)
        log_weight = tail_log_weight(
            drawn, own | policy.contains(slots, index, drawn), total - (near.slots >= 0).sum(1)
        )
        negatives = with_fresh_batch(batch, bank.read(drawn), drawn_ids, log_weight)
        stats = LookupStats(batch.positive, near.similarity, near.slots, batch.step)
        return Mined(with_hard(negatives, bank, slots, index), stats)


def tail_log_weight(
    drawn: Int[Tensor, " m"], apart: Bool[Tensor, "b m"], tail: Int[Tensor, " b"]
) -> Float[Tensor, "b m"]:
    """Return log(|tail| / m_q) for the drawn rows in each query's tail, -inf for the others.

    Args:
        drawn: Slots of the shared sample; -1 is none.
        apart: True where a drawn row is the query's own, or was retrieved for it.
        tail: |A \\ R|: admissible rows of each query that were not retrieved.
    """
    in_tail = (drawn >= 0)[None] & ~apart
    log_weight = (tail / in_tail.sum(1)).log().float()
    return log_weight[:, None].expand(in_tail.shape).masked_fill(~in_tail, -torch.inf)

"""The partition function of the whole bank from its largest terms and a weighted sample of the rest.

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


def tail_log_weight(
    drawn: Int[Tensor, " m"], apart: Bool[Tensor, "b m"], tail: Int[Tensor, " b"]
) -> Float[Tensor, "b m"]:
    """log(|tail| / m_q) for the drawn rows in each query's tail, -inf for the others.

    Args:
        drawn: Slots of the shared sample; -1 is none.
        apart: True where a drawn row is the query's own, or was retrieved for it.
        tail: |A \\ R|: admissible rows of each query that were not retrieved.
    """
    in_tail = (drawn >= 0)[None] & ~apart
    log_weight = (tail / in_tail.sum(1)).log().float()
    return log_weight[:, None].expand(in_tail.shape).masked_fill(~in_tail, -torch.inf)

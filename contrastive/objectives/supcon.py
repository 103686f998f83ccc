"""SupCon: all images of the same class are positives. Needs labels, so an oracle, never a default."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive.objectives.logits import Diagnostics, Logits
from memory_bank.negatives import Negatives


def supcon(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    negatives: Negatives,
    *,
    temperature: float,
    ids: Int[Tensor, " b"],
    labels: Int[Tensor, " n"],
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Mean over a query's positives p of ``-log e^(s_p) / sum_a w_a e^(s_a)``, a over all rows it meets.

    SupCon eq. 2, the sum outside the log (Khosla et al. 2020, arXiv:2004.11362). Positives are the key, the
    extra positives, and those negatives that carry the query's label, by their weights ``w_a``.

    Args:
        query: As ``info_nce``, and likewise the next three.
        key: See query.
        negatives: Any rows; rows of the same class in them become positives.
        temperature: See query.
        ids: The queries' data set rows.
        labels: Of the whole data set, by row; -1 is unknown and matches nothing.
    """
    logits = Logits.of(query, key, negatives, temperature)
    same = _same_label(ids, negatives, labels)
    # Weights of positives as logs: given ones, then those of the rows with the query's label.
    given = torch.cat([torch.ones_like(logits.positive[:, :1]), negatives.extra_positive_weight], 1).log()
    found = logits.log_weight.masked_fill(~same, -torch.inf)
    rows = torch.cat([logits.positive, logits.negative], 1)
    share = torch.softmax(torch.cat([given, found], 1), 1)
    everything = torch.logsumexp(rows + torch.cat([given, logits.log_weight], 1), 1)
    loss = (everything - (share * rows).sum(1)).mean()
    positives = 1 + (found > -torch.inf).sum(1)
    return loss, logits.diagnostics() | {"positives": positives.to(loss.dtype).mean()}


def _same_label(
    ids: Int[Tensor, " b"], negatives: Negatives, labels: Int[Tensor, " n"]
) -> Bool[Tensor, "b c"]:
    """Which negatives, hard then shared, carry the query's label."""
    own = _lookup(ids, labels)[:, None]
    hard = _lookup(negatives.hard_ids, labels) == own
    shared = _lookup(negatives.shared_ids, labels)[None] == own
    return torch.cat([hard, shared], 1) & (own >= 0)


def _lookup(ids: Tensor, labels: Tensor) -> Tensor:
    """Label of each row, -1 for row -1, which indexing would read as the last one."""
    return torch.where(ids >= 0, labels[ids.clamp(min=0)], -1)

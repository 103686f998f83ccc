"""SupCon: all images of the same class are positives. It needs labels, so it is only an oracle."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive.objectives.build import LossSettings, Objective
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
    """Compute the mean over a query's positives p of ``-log e^(s_p) / sum_a w_a e^(s_a)``.

    The index a runs over positives and negatives: SupCon eq. 2, the sum over p outside the log (Khosla et al.
    2020, arXiv:2004.11362). Positives are the key, the extra positives, and negatives with the query's label,
    by their weights ``w_a``. Differs: the authors' code multiplies the loss by temperature / 0.07.

    Args:
        query: See ``info_nce``.
        key: See ``info_nce``.
        negatives: Any rows; those of the query's class become positives.
        temperature: See ``info_nce``.
        ids: The queries' data set rows.
        labels: Class of each row of the data set; -1 is unknown and matches nothing.
    """
    logits = Logits.of(query, key, negatives, temperature)
    same = _same_label(ids, negatives, labels)
    # Log-weights of positives: key and extra positives, then negatives with the query's label.
    own = torch.cat([torch.ones_like(logits.positive[:, :1]), negatives.extra_positive_weight], 1).log()
    same_weight = logits.log_weight.masked_fill(~same, -torch.inf)
    rows = torch.cat([logits.positive, logits.negative], 1)
    share = torch.softmax(torch.cat([own, same_weight], 1), 1)
    everything = torch.logsumexp(rows + torch.cat([own, logits.log_weight], 1), 1)
    loss = (everything - (share * rows).sum(1)).mean()
    positives = 1 + (same_weight > -torch.inf).sum(1)
    return loss, logits.diagnostics() | {"positives": positives.to(loss.dtype).mean()}


def _same_label(
    ids: Int[Tensor, " b"], negatives: Negatives, labels: Int[Tensor, " n"]
) -> Bool[Tensor, "b c"]:
    """Return which negatives, hard then shared, have the query's label."""
    own = _lookup(ids, labels)[:, None]
    hard = _lookup(negatives.hard_ids, labels) == own
    shared = _lookup(negatives.shared_ids, labels)[None] == own
    return torch.cat([hard, shared], 1) & (own >= 0)


def _lookup(ids: Tensor, labels: Tensor) -> Tensor:
    """Look up the label of each row; -1 for row -1, which indexing would read as the last row."""
    return torch.where(ids >= 0, labels[ids.clamp(min=0)], -1)


def build(settings: LossSettings, labels: Int[Tensor, " n"]) -> Objective:
    """Build ``supcon`` for a run."""
    by_device = {labels.device: labels}

    def inputs(ids: Tensor, step: int) -> dict[str, Any]:
        if ids.device not in by_device:
            by_device[ids.device] = labels.to(ids.device)
        return {"ids": ids, "labels": by_device[ids.device]}

    return Objective("supcon", partial(supcon, temperature=settings.config.temperature), inputs)

"""NNCLR: the positive is a neighbour from the bank, the negatives are the batch's other predictions."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import UserError
from contrastive.objectives.in_batch import others_in_batch
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


def nnclr(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Each neighbour finds its own query among the queries of the whole batch.

    ``-log e^(n_i q_i) / sum_j e^(n_i q_j)`` over temperature, j over the batch of all ranks and n_i the
    bank's nearest row to the key of image i: NNCLR eq. 2 (Dwibedi et al. 2021, arXiv:2104.14548). All q_j
    carry gradient. The published loss is symmetric: set ``objective.symmetric``.
    Differs: keys and bank are of the EMA network, the paper's are of the query's (``encoder.momentum=0``).

    Collective: every rank must call it.

    Args:
        query: Predictions of view 1, unit-norm rows; carries gradient.
        key: Projections of view 2, unit-norm rows; the positive of a query without a neighbour.
        negatives: Gives the neighbour, its extra positive of the highest weight (``attach_neighbour``).
            Negatives are not used: between two detached rows there is no gradient.
        temperature: > 0; the paper's is 0.1.

    Returns:
        As ``info_nce``; a further diagnostic is ``neighbours``, the share of queries with one.
    """
    # The key stands in front, with a weight that only an absent neighbour's 0 is below.
    weight = F.pad(negatives.extra_positive_weight, (1, 0), value=torch.finfo(torch.float32).tiny)
    column = weight.argmax(1)
    positives = torch.cat([key[:, None], negatives.extra_positives.to(key.dtype)], 1)
    positive = positives[torch.arange(len(key), device=key.device), column]
    loss, diagnostics = info_nce(positive, query, others_in_batch(query), temperature=temperature)
    with torch.no_grad():
        own = F.cosine_similarity(query.float(), key.float()).mean()
    found = (column > 0).to(loss.dtype).mean()
    return loss, diagnostics | {"positive_similarity": own.to(loss.dtype), "neighbours": found}


def attach_neighbour(
    negatives: Negatives, neighbour: Float[Tensor, "b d"], ids: Int[Tensor, " b"]
) -> Negatives:
    """``negatives`` with one more extra positive a query, which is excluded from its negatives.

    Args:
        negatives: Left as they are.
        neighbour: Unit-norm rows of the bank, detached.
        ids: Their data set rows; -1 where there is none: that row is not used.
    """
    rows, known = ids[:, None], ids[:, None] >= 0
    positives, weight = negatives.extra_positives, negatives.extra_positive_weight
    return replace(
        negatives,
        hard_log_weight=negatives.hard_log_weight.masked_fill(
            known & (negatives.hard_ids == rows), -torch.inf
        ),
        shared_log_weight=negatives.shared_log_weight.masked_fill(
            known & (negatives.shared_ids == rows), -torch.inf
        ),
        extra_positives=torch.cat([positives, neighbour[:, None].to(positives.dtype)], 1),
        extra_positive_weight=torch.cat([weight, known.to(weight.dtype)], 1),
    )


def refuse_other_nnclr(name: str, saved: str | None) -> None:
    """Raise UserError where ``nnclr`` would continue a run of the loss that formerly had this name.

    Args:
        name: ``objective.name`` of the run.
        saved: That of its checkpoint; None in one written before ``nnclr`` was eq. 2.
    """
    if name == "nnclr" and saved is None:
        raise UserError(
            "objective.name=nnclr: this checkpoint was trained with the loss that is now named "
            "neighbour_info_nce; write objective.name: neighbour_info_nce into the config.yaml of its run "
            "and resume with objective.name=neighbour_info_nce, or choose another run.name"
        )

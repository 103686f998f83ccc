"""NT-Xent: the other images of the batch are the negatives, and they learn too."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.objectives.in_batch import others_in_batch
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


def nt_xent(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Both views tell each other from all other views of the batch, over all ranks.

    SimCLR eq. 1 and algorithm 1 (Chen et al. 2020, arXiv:2002.05709): for each of the 2 g views
    ``-log e^s / sum_(j != i) e^(s_j)``, s its other view, j over all other views; the mean over the 2 b
    local ones. Times ``distributed.mean_weight``, which is 1 for ranks of equal size, the mean over ranks and
    DDP's mean gradient equal one process on the joined batch.

    Collective: every rank must call it. ``negatives`` push view 1 further; SimCLR has none.

    Args:
        query: View 1, unit-norm rows; carries gradient.
        key: View 2, from the same network; carries gradient too.
        negatives: Beside the batch; may be empty, and must not hold rows of the batch again.
        temperature: > 0; 0.1 to 0.5 is usual.

    Returns:
        As ``info_nce``; diagnostics are of view 1.
    """
    batch = others_in_batch(query, key)
    joined = replace(
        negatives,
        shared=torch.cat([batch.shared, negatives.shared.to(batch.shared.dtype)]),
        shared_log_weight=torch.cat([batch.shared_log_weight, negatives.shared_log_weight], 1),
        shared_ids=torch.cat([batch.shared_ids, negatives.shared_ids]),
    )
    forward, diagnostics = info_nce(query, key, joined, temperature=temperature)
    backward, _ = info_nce(key, query, batch, temperature=temperature)
    return (forward + backward) / 2, diagnostics

"""NT-Xent: the other images of the batch are the negatives, and they learn too."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import gather_sizes, gather_with_grad, rank
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Diagnostics
from memory_bank.negatives import Negatives


def nt_xent(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Both views tell each other from all other views of the batch, over all ranks.

    SimCLR eq. 1 and algorithm 1 (Chen et al. 2020, arXiv:2002.05709): for each of the 2 g views
    ``-log e^s / sum_(j != i) e^(s_j)``, s its other view, j over all other views; the mean over the 2 b
    local ones. The mean over ranks, and DDP's mean gradient, equal one process on the joined batch.

    Collective: every rank must call it. ``negatives`` push view 1 further; SimCLR has none.

    Args:
        query: View 1, unit-norm rows; carries gradient.
        key: View 2, from the same network; carries gradient too.
        negatives: Beside the batch; may be empty, and must not hold rows of the batch again.
        temperature: > 0; 0.1 to 0.5 is usual.

    Returns:
        As ``info_nce``; diagnostics are of view 1.
    """
    batch = _others(query, key, negatives)
    joined = replace(
        negatives,
        shared=torch.cat([batch.shared, negatives.shared.to(batch.shared.dtype)]),
        shared_log_weight=torch.cat([batch.shared_log_weight, negatives.shared_log_weight], 1),
        shared_ids=torch.cat([batch.shared_ids, negatives.shared_ids]),
    )
    forward, diagnostics = info_nce(query, key, joined, temperature=temperature)
    backward, _ = info_nce(key, query, batch, temperature=temperature)
    return (forward + backward) / 2, diagnostics


def _others(query: Tensor, key: Tensor, negatives: Negatives) -> Negatives:
    """All views of all ranks, shared, without each query's own two."""
    rows = len(query)
    sizes = gather_sizes(rows, query.device)
    # One collective for both views: a gathered row holds the two of an image side by side.
    views = gather_with_grad(torch.cat([query, key], 1), sizes).reshape(-1, query.shape[1])
    image = torch.arange(len(views), device=query.device) // 2
    own = sum(sizes[: rank()]) + torch.arange(rows, device=query.device)
    log_weight = torch.zeros(rows, len(views), dtype=torch.float32, device=query.device)
    return replace(
        Negatives.none(query),
        shared=views,
        shared_log_weight=log_weight.masked_fill_(own[:, None] == image, -torch.inf),
        shared_ids=torch.full_like(image, -1),
    )

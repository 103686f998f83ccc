"""The other images of the batch as negatives that learn."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import gather_sizes, gather_with_grad, rank
from memory_bank.negatives import Negatives


def others_in_batch(*views: Float[Tensor, "b d"]) -> Negatives:
    """All views of the other images of all ranks, shared, with gradient.

    Collective: every rank must call it.

    Args:
        views: Unit-norm rows of the same images, one tensor a view.
    """
    rows, dim = views[0].shape
    sizes = gather_sizes(rows, views[0].device)
    # One collective for all views: a gathered row holds those of an image side by side.
    gathered = gather_with_grad(torch.cat(views, 1), sizes).reshape(-1, dim)
    image = torch.arange(len(gathered), device=gathered.device) // len(views)
    own = sum(sizes[: rank()]) + torch.arange(rows, device=gathered.device)
    log_weight = torch.zeros(rows, len(gathered), dtype=torch.float32, device=gathered.device)
    return replace(
        Negatives.none(views[0]),
        shared=gathered,
        shared_log_weight=log_weight.masked_fill_(own[:, None] == image, -torch.inf),
        shared_ids=torch.full_like(image, -1),
    )

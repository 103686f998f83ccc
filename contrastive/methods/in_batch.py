"""Use the other images of the batch as negatives."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import Rows, gather_with_grad
from memory_bank.negatives import Negatives, log_mask


def other_images(
    views: Sequence[Float[Tensor, "b d"]], rows: Rows
) -> tuple[Negatives, Float[Tensor, "g v d"]]:
    """Gather the views of all ranks; the negatives of a query are the views of all other images.

    Collective: every rank must call it.

    Args:
        views: Unit-norm rows of the same images, one tensor a view.
        rows: The images' data set rows.

    Returns:
        The negatives, shared, with gradient, each query's own views excluded; and all views.
    """
    # One collective for all views: a gathered row holds those of an image side by side.
    gathered = gather_with_grad(torch.cat(list(views), 1), rows.sizes)
    gathered = gathered.reshape(-1, len(views), views[0].shape[1])
    image = torch.arange(len(gathered), device=gathered.device)
    own = rows.own(image)[:, None] == image.repeat_interleave(len(views))
    negatives = replace(
        Negatives.none(views[0].detach()),
        shared=gathered.flatten(0, 1),
        shared_log_weight=log_mask(own),
        shared_ids=rows.all_ids.repeat_interleave(len(views)),
    )
    return negatives, gathered

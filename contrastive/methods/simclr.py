"""SimCLR: the other images of the batch are the negatives, and all views carry gradient."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from contrastive.distributed import Rows, gather_with_grad
from contrastive.methods.method import Method, Outcome, Parts, mean_over_pairs
from contrastive.objectives.build import Objective, build_objective
from memory_bank.negatives import Negatives
from memory_bank.shapes import Float


class SimClr(Method):
    """Match both views of an image with each other, push them away from all other views of the batch.

    SimCLR, algorithm 1 (Chen et al. 2020, arXiv:2002.05709); with ``objective.name=info_nce`` the loss is
    NT-Xent, eq. 1. Any objective on given negatives can take its place: the negatives are all views of the
    other images of all ranks, with gradient, which is how the authors of DCL, debiased, HCL and SupCon train.
    The mean over ranks, and DDP's mean gradient, equal one process on the joined batch.

    Args:
        parts: See Method.
        objective: See Moco.
    """

    averages_keys = False

    def __init__(self, parts: Parts, objective: Objective | None = None) -> None:
        super().__init__(parts)
        config = parts.config
        self.objective = objective or build_objective(
            config.objective, config.mining, seed=config.run.seed, labels=parts.labels
        )

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. The bank, which only monitors read here, stores view 2."""
        first, second, *local = (self.networks.embed(view) for view in views)
        negatives, others = other_images(first, second, rows)
        pairs = [(first, second), (second, first)]
        pairs += [(crop, whole) for whole in (first, second) for crop in local]
        loss, diagnostics = mean_over_pairs(self.objective, pairs, negatives, rows, step)
        return Outcome(loss, diagnostics, others[:, 1].detach(), first.detach(), negatives)


def other_images(
    first: Float[Tensor, "b d"], second: Float[Tensor, "b d"], rows: Rows
) -> tuple[Negatives, Float[Tensor, "g 2 d"]]:
    """Gather both views of all ranks, and make those of the other images each query's negatives.

    Returns:
        The negatives, shared, with gradient and with each query's own two views excluded; and the views.
    """
    # One collective for both views: a gathered row holds the two of an image side by side.
    views = gather_with_grad(torch.cat([first, second], 1), rows.sizes).reshape(-1, 2, first.shape[1])
    image = torch.arange(len(views), device=first.device)
    log_weight = torch.zeros(len(first), 2 * len(views), dtype=torch.float32, device=first.device)
    own = rows.own(image)[:, None] == image.repeat_interleave(2)
    negatives = replace(
        Negatives.none(first.detach()),
        shared=views.flatten(0, 1),
        shared_log_weight=log_weight.masked_fill_(own, -torch.inf),
        shared_ids=rows.all_ids.repeat_interleave(2),
    )
    return negatives, views

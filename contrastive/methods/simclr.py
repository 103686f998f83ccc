"""SimCLR: the other images of the batch are the negatives, and all views carry gradient."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import Rows
from contrastive.methods.in_batch import other_images
from contrastive.methods.method import Method, Outcome, Parts, add_own, mean_outcome
from contrastive.objectives.build import Loss


class SimClr(Method):
    """Match both views of an image with each other, push them away from all other views of the batch.

    SimCLR, algorithm 1 (Chen et al. 2020, arXiv:2002.05709); with ``objective.name=info_nce`` the loss is
    NT-Xent, eq. 1. Any objective on given negatives can take its place: the negatives are all views of the
    other images of all ranks, with gradient, as the authors of DCL, debiased, HCL and SupCon train. Times
    ``distributed.mean_weight``, the mean over ranks equals one process on the joined batch. With
    ``objective.own_negatives`` each query also has its own view, disturbed in time, or
    another clip of its video.

    Args:
        parts: See Method.
        objective: See Moco.
    """

    averages_keys = False
    mines = False
    takes_own_negatives = True

    def __init__(self, parts: Parts, objective: Loss | None = None) -> None:
        super().__init__(parts)
        self.objective: Loss = objective or self.build_loss()

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. The bank, which only monitors read here, stores view 2."""
        frames, other = self.take_other([self.networks.encode_frames(view) for view in views])
        first, second, *local = (self.networks.embed_frames(each) for each in frames)
        negatives, gathered = other_images((first, second), rows)
        own_1, own_2, *own = (
            add_own(negatives, self.own_negatives(each, other, rows, step)) for each in frames
        )
        pairs = [(first, second, own_1), (second, first, own_2)]
        pairs += [
            (crop, whole, each) for whole in (first, second) for crop, each in zip(local, own, strict=True)
        ]
        compared = [self.objective(*pair, ids=rows.ids, step=step) for pair in pairs]
        return mean_outcome(compared, gathered[:, 1].detach(), first.detach(), negatives)

"""NNCLR: match a neighbour from the bank with the prediction of the image, among those of the batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError
from contrastive.distributed import Rows, gather_rows
from contrastive.methods.in_batch import other_images
from contrastive.methods.method import Method, Outcome, Parts, mean_outcome
from contrastive.objectives.build import Loss
from contrastive.objectives.logits import Diagnostics


class Nnclr(Method):
    """Match the nearest bank row of each view with the prediction of the other view.

    ``-log e^(n_i p_i) / sum_j e^(n_i p_j)`` over temperature, n_i the bank's nearest row to the projection of
    one view of image i, p_j the predictions of the other view of the whole batch, with gradient: Dwibedi et
    al. 2021 (arXiv:2104.14548), eq. 2, averaged over both directions. The bank stores projections of view 1
    of the query network. Differs: an image's own stored row is never its neighbour; where the bank has no
    row yet, the projection itself is used instead of the neighbour.

    Args:
        parts: See Method.
        objective: See Moco; the neighbour is its ``query``, the predictions are its keys and negatives.
    """

    averages_keys = False
    mines = False
    finds_neighbours = True

    def __init__(self, parts: Parts, objective: Loss | None = None) -> None:
        super().__init__(parts)
        self.objective: Loss = objective or self.build_loss()

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. Local views of multi-crop are predictions only."""
        (first, predicted_1), (second, predicted_2), *local = map(self.networks.project_and_predict, views)
        predictions = [predicted_1, predicted_2, *(predicted for _, predicted in local)]
        sides = [(first, [1, *range(2, len(views))]), (second, [0, *range(2, len(views))])]
        compared = [
            self._compare(projection.detach(), predictions[other], rows, step)
            for projection, others in sides
            for other in others
        ]
        keys = gather_rows(first, rows.sizes)
        return mean_outcome(compared, keys)

    def _compare(
        self, projection: Float[Tensor, "b d"], predicted: Float[Tensor, "b d"], rows: Rows, step: int
    ) -> tuple[Float[Tensor, ""], Diagnostics]:
        ids, neighbour = self.nearest_rows(projection, rows, step)
        known = ids >= 0
        neighbour = torch.where(known[:, None], neighbour.to(projection.dtype), projection)
        negatives, _ = other_images([predicted], rows)
        loss, diagnostics = self.objective(neighbour, predicted, negatives, ids=rows.ids, step=step)
        return loss, diagnostics | {"neighbours": known.to(loss.dtype).mean()}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of the loss that had this name before it was eq. 2."""
        if "objective" not in checkpoint:
            raise UserError(
                "method=nnclr: this checkpoint was trained with the loss that is now named "
                "neighbour_info_nce; write objective.name: neighbour_info_nce into the config.yaml of its "
                "run and resume with method=neighbour objective.name=neighbour_info_nce, or choose another "
                "run.name"
            )

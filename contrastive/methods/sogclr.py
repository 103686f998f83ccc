"""SogCLR: the loss over all images without a bank, by a running denominator of each image."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError
from contrastive.distributed import Rows, gather_rows
from contrastive.methods.in_batch import other_images
from contrastive.methods.method import Method, Outcome, Parts
from contrastive.objectives.logits import Logits

# Log-denominator of a row that was in no batch yet: above any other, and finite, as the guard wants buffers.
_UNSEEN = 1e6


class SogClr(Method):
    """Push both views of an image away from the batch's other images, weighed by the image's own denominator.

    SogCLR, algorithm 1 (Yuan et al. 2022, arXiv:2202.12387). For image i let g_i be the mean of
    ``e^(s / T)`` over the views of the batch's other images, averaged over both of its own views as queries.
    The running denominator ``u_i = (1 - gamma) u_i + gamma g_i`` estimates the mean over the whole data set,
    and the gradient is that of ``-s_i / T + g_i / u_i`` with u_i constant: that of the *global* loss
    ``-s_i / T + log g_i`` as u_i approaches the g_i of all images. With ``gamma=1`` it is exactly that loss
    on the batch: SimCLR without the positive in the denominator (DCL), the mean inside the logarithm.
    Differs: multiplied by 1 / T as all losses here; a row's first g_i becomes its u_i, as in the authors'
    code; u_i is kept as its logarithm, so that no temperature overflows; local views count as queries too.

    Attributes:
        log_denominator: (n,) log u_i of each data set row, float32, equal on all ranks.
    """

    averages_keys = False
    mines = False
    reads = frozenset({"objective.gamma"})
    row_buffers = ("log_denominator",)
    log_denominator: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = parts.config
        if config.objective.name != "info_nce":
            raise UserError(
                f"objective.name={config.objective.name}: method=sogclr has a loss of its own; leave "
                "objective.name out, or use method=simclr"
            )
        self.temperature, self.gamma = config.objective.temperature, config.objective.gamma
        self.register_buffer("log_denominator", torch.full((parts.rows,), _UNSEEN))

    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """See Method. The bank, which only monitors read here, stores view 2."""
        first, second, *local = (self.networks.embed(view) for view in views)
        negatives, gathered = other_images((first, second), rows)
        pairs = [(first, second), (second, first)]
        pairs += [(crop, whole) for whole in (first, second) for crop in local]
        logits = [Logits.of(*pair, negatives, self.temperature) for pair in pairs]
        positive = torch.stack([each.positive[:, 0] for each in logits])
        log_mean = torch.stack([each.log_sum() - each.log_sum(0.0) for each in logits])  # log g, (pairs, b)
        log_u = self._move(log_mean.logsumexp(0) - math.log(len(pairs)), rows)
        ratio = (log_mean - log_u).exp()
        # The value is that of the loss with log u_i for log g_i; the ratio contributes its gradient alone.
        loss = (log_u - positive + ratio - ratio.detach()).mean()
        return Outcome(loss, logits[0].diagnostics(), gathered[:, 1].detach(), first.detach(), negatives)

    @torch.no_grad()
    def _move(self, log_g: Float[Tensor, " b"], rows: Rows) -> Float[Tensor, " b"]:
        """Move the denominators of all ranks' images towards ``log_g``; return those of this rank's."""
        log_g = gather_rows(log_g.float(), rows.sizes)
        before = self.log_denominator[rows.all_ids]
        kept = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        moved = torch.logaddexp(before + kept, log_g + math.log(self.gamma))
        after = torch.where(before == _UNSEEN, log_g, moved)
        self.log_denominator[rows.all_ids] = after
        return rows.own(after)

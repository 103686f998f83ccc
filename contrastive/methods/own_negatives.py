"""Disturb a clip in time, so that it becomes a negative of its own query."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.augment.noise import uniforms

_STREAM = 4_000
"""Number of the noise that shuffles frames and chooses the frozen one; views have small numbers."""


def disturb(
    kind: str, clip: Float[Tensor, "b t ..."], ids: Int[Tensor, " b"], seed: int, step: int
) -> Float[Tensor, "b t ..."]:
    """Return each clip with its frames in another order, or with one of them alone.

    IIC (Tao et al. 2020, arXiv:2008.13426) calls shuffled and repeated frames intra-negatives. A pure
    function of (seed, step, id).

    Args:
        kind: ``shuffle``, ``reverse`` or ``freeze``, see ``objective.own_negatives``.
        clip: Clips of two frames or more, or the features of their frames.
        ids: Their data set rows.
        seed: Seed of the run.
        step: Optimizer step.
    """
    t = clip.shape[1]
    numbers = uniforms(seed, step, ids, _STREAM, t)
    uniform = torch.arange(t, device=clip.device).expand(len(clip), t)
    if kind == "reverse":
        order = uniform.flip(1)
    elif kind == "freeze":
        order = (t * numbers[:, :1]).long().expand(-1, t)
    else:
        order = numbers.argsort(1)
        unchanged = (order == uniform).all(1, keepdim=True)
        order = torch.where(unchanged, uniform.roll(1, 1), order)
    return clip[torch.arange(len(clip), device=clip.device)[:, None], order]

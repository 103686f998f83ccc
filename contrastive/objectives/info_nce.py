"""InfoNCE: cross-entropy of the key against negatives."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from contrastive.objectives.build import LossSettings, Objective
from contrastive.objectives.logits import Diagnostics, Logits, info_nce_of
from memory_bank.negatives import Negatives


def info_nce(
    query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, *, temperature: float
) -> tuple[Float[Tensor, ""], Diagnostics]:
    """Compute InfoNCE: the cross-entropy of each query's key against its negatives.

    ``-log e^s / (e^s + sum_j w_j e^(s_j))`` with ``s`` the similarities divided by temperature: MoCo eq. 1
    (He et al. 2020, arXiv:1911.05722), averaged over b.
    Differs: negatives may be per query, shared, or both, and carry weights ``w_j`` (1 in the paper).

    Args:
        query: Unit-norm rows; carries gradient.
        key: Unit-norm rows; detached by the caller.
        negatives: May be empty: the loss is then 0.
        temperature: > 0; 0.07 to 0.5 is usual.

    Returns:
        Scalar float32 in nats, also under autocast, and ``Logits.diagnostics``.

    Raises:
        ValueError: temperature <= 0.
    """
    logits = Logits.of(query, key, negatives, temperature)
    return info_nce_of(logits), logits.diagnostics()


def build(settings: LossSettings) -> Objective:
    """Build ``info_nce`` for a run."""
    return Objective("info_nce", partial(info_nce, temperature=settings.config.temperature))

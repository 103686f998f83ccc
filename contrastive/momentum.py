"""The key encoder: an exponential moving average of the query encoder."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(online: nn.Module, target: nn.Module, momentum: float) -> None:
    """``target <- momentum * target + (1 - momentum) * online``, in place.

    MoCo eq. 2 (arXiv:1911.05722). Buffers are copied: a mean of batch-norm statistics that are means
    themselves would lag twice, and counters cannot be averaged.

    Args:
        online: Source; unchanged.
        target: Module of the same structure, on the same device.
        momentum: In [0, 1]; 1 leaves the parameters as they are.

    Raises:
        ValueError: momentum out of range, or the structures differ.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: allowed is 0 to 1; usual are 0.99 to 0.9999")
    sources, targets = _paired(dict(online.named_parameters()), dict(target.named_parameters()))
    if targets:
        torch._foreach_lerp_(targets, sources, 1 - momentum)
    sources, targets = _paired(dict(online.named_buffers()), dict(target.named_buffers()))
    if targets:
        torch._foreach_copy_(targets, sources)


def _paired(online: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    shapes = {name: value.shape for name, value in online.items()}
    if shapes != {name: value.shape for name, value in target.items()}:
        odd = sorted({*online} ^ {*target}) or [n for n, s in shapes.items() if s != target[n].shape]
        raise ValueError(
            f"{odd[0]}: differs between the two modules; make the target by copy.deepcopy(online)"
        )
    return [value.detach() for value in online.values()], [target[name].detach() for name in online]


def momentum_at(step: int, total: int, start: float, end: float | None = None) -> float:
    """Momentum of optimizer step ``step`` of ``total``: a cosine from ``start`` to ``end``; None stays.

    ``end - (end - start) * (1 + cos(pi * step / total)) / 2``: BYOL, section 3.3, where ``end`` is 1.
    """
    if end is None:
        return start
    progress = min(max(step / max(total, 1), 0.0), 1.0)
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2

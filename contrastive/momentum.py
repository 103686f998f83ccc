"""Update the key network: an exponential moving average of the query network."""

import math

import torch
from torch import Tensor, nn


class Ema:
    """Updates ``target`` as an exponential moving average of ``online``, in place, all tensors at once.

    Tensors are paired once, on construction, since looking them up by name costs more than the update of a
    small network. Construct it when both modules are on the training device: moving one replaces its tensors.

    Args:
        online: Source; not modified.
        target: Module of the same structure, on the same device.

    Raises:
        ValueError: the structures differ.
    """

    def __init__(self, online: nn.Module, target: nn.Module) -> None:
        self._parameters = _paired(dict(online.named_parameters()), dict(target.named_parameters()))
        self._buffers = _paired(dict(online.named_buffers()), dict(target.named_buffers()))

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        """Set ``target <- momentum * target + (1 - momentum) * online``: MoCo eq. 2 (arXiv:1911.05722).

        Buffers are copied: batch-norm statistics are moving averages already and would lag twice, and
        counters cannot be averaged.

        Args:
            momentum: In [0, 1]; with 1 the parameters do not change.

        Raises:
            ValueError: momentum out of range.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: allowed is 0 to 1; usual are 0.99 to 0.9999")
        sources, targets = self._parameters
        if targets:
            torch._foreach_lerp_(targets, sources, 1 - momentum)
        sources, targets = self._buffers
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
    """Compute the momentum of step ``step`` of ``total``: a cosine from ``start`` to ``end``.

    ``end - (end - start) * (1 + cos(pi * step / total)) / 2``: BYOL, section 3.3, where ``end`` is 1.

    Args:
        step: 0 for the first; at or after ``total`` the momentum is ``end``.
        total: 1 or more.
        start: Momentum of step 0.
        end: Momentum after the last step; None keeps ``start``.

    Raises:
        ValueError: step or total out of range.
    """
    if step < 0 or total < 1:
        raise ValueError(f"step={step}, total={total}: 0 <= step and 1 <= total are needed")
    if end is None:
        return start
    progress = min(step / total, 1.0)
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2

"""Build the optimizer, and compute the learning rate schedule."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive.config import OptimizerConfig

#: SimCLR's trust coefficient (arXiv:2002.05709, released code).
LARS_TRUST = 0.001


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    global_batch: int,
    *,
    fuse: bool = True,
    depths: Mapping[str, int] | None = None,
) -> Optimizer:
    """Build the optimizer of ``config`` over the trainable parameters of ``module``.

    The peak learning rate is ``base_lr * global_batch / 256`` (arXiv:1706.02677). The module must be on
    its training device already: on CUDA the step is one fused kernel per group, elsewhere torch decides.

    Args:
        module: On its training device.
        config: Name and settings of the optimizer.
        global_batch: Images of one step.
        fuse: Must be False if gradients are read between the backward pass and the step: with a loss scale
            (16-mixed) a fused kernel unscales them itself, and they cannot be clipped.
        depths: Depth of the encoder's parameters in blocks, by name in ``module``, for ``layer_decay``.
    """
    shares = layer_shares(depths or {}, config.layer_decay)
    groups = parameter_groups(module, config.weight_decay, shares)
    peak = config.base_lr * global_batch / 256
    for group in groups:
        group["lr"] = peak * group.pop("share")
    # With None torch chooses; on CUDA it would choose foreach, which accesses memory more often.
    fused = True if fuse and _on_cuda(groups) else None
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=peak, momentum=config.sgd_momentum, fused=fused)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=peak, fused=fused)
    return LARS(groups, lr=peak, momentum=config.sgd_momentum)


def layer_shares(depths: Mapping[str, int], layer_decay: float) -> dict[str, float]:
    """Compute the share of the learning rate for each parameter of the encoder: BEiT (arXiv:2106.08254).

    ``layer_decay ** (top - depth)``, where ``top`` is one more than the largest depth: that of the heads.

    Args:
        depths: Depth in blocks by name, 0 for what comes before the first block.
        layer_decay: Above 0, up to 1.
    """
    top = max(depths.values(), default=0) + 1
    return {name: layer_decay ** (top - depth) for name, depth in depths.items()}


def parameter_groups(
    module: nn.Module, weight_decay: float, shares: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Split trainable parameters into groups: with weight decay and without, for each share of the rate.

    Without decay are biases and normalisation layers (fewer than two axes), positions, class tokens and layer
    scales (by name), and those that a network's own ``no_weight_decay()`` names, as in timm's networks.

    Args:
        module: Its trainable parameters are taken.
        weight_decay: That of the groups with decay.
        shares: Shares of the learning rate by parameter name; 1 for those without.

    Returns:
        Groups with the entry ``share``, the largest first.
    """
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trainable:
        raise ValueError("the module has no trainable parameter; nothing to optimise")
    exempt = _named_by_networks(module)
    members: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in trainable.items():
        decays = parameter.ndim > 1 and name not in exempt and not _UNDECAYED.search(name)
        members.setdefault(((shares or {}).get(name, 1.0), decays), []).append(parameter)
    return [
        {
            "params": members[share, decays],
            "weight_decay": weight_decay if decays else 0.0,
            "adapt": decays,
            "share": share,
        }
        for share, decays in sorted(members, reverse=True)
    ]


_UNDECAYED = re.compile(
    r"(^|[._])(pos_embed|pos_embedding|position_embeddings?|relative_position_bias_table|layer_scale"
    r"|((cls|class|dist|reg|register|mask)_tokens?))$"
)
"""Ends of the names of positions, class tokens and layer scales in torchvision, timm and transformers."""


def _named_by_networks(module: nn.Module) -> set[str]:
    """Return the parameters that the networks inside ``module`` want without weight decay."""
    names: set[str] = set()
    for prefix, part in module.named_modules():
        if callable(listed := getattr(part, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}".removeprefix(".") for name in listed()}
    return names


def _on_cuda(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def learning_rate(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Compute the share of the peak learning rate for optimizer step ``step``; a pure function.

    Warm-up ``(step + 1) / (warmup_steps + 1)``, never 0 and 1 at ``step == warmup_steps``; from there
    ``(1 + cos(pi * t)) / 2`` with t running from 0 to 1 at ``total_steps`` (SGDR, arXiv:1608.03983, eq. 5).

    Args:
        step: 0 for the first; at or after ``total_steps`` the share is 0.
        total_steps: 1 or more.
        warmup_steps: 0 to ``total_steps``.

    Raises:
        ValueError: steps out of range.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"step={step}, warmup_steps={warmup_steps}, total_steps={total_steps}: "
            "0 <= step and 0 <= warmup_steps <= total_steps are needed"
        )
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, for large batches.

    You et al. 2017 (arXiv:1708.03888), algorithm 1, in SimCLR's form: with ``g = gradient + decay * w``,
    ``v <- momentum * v + lr * trust * |w| / |g| * g`` and ``w <- w - v``. The learning rate is inside the
    velocity, as in the paper, so a change of it takes effect with the momentum's delay. The ratio is 1 where
    either norm is 0 and in groups with ``adapt=False`` (biases, normalisation).

    Args:
        params: Parameters or groups; a group may carry ``weight_decay`` and ``adapt``.
        lr: Global learning rate, more than 0.
        momentum: In [0, 1).
        weight_decay: Weight decay of groups that do not set their own.
        trust: Trust coefficient eta.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = LARS_TRUST,
    ) -> None:
        if not lr > 0 or not 0 <= momentum < 1 or not trust > 0:
            raise ValueError(
                f"lr={lr}, momentum={momentum}, trust={trust}: lr > 0, 0 <= momentum < 1, trust > 0"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters; those without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        updates = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(weights, updates, group["trust"]))
        velocities = [self._velocity(weight) for weight in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: Tensor = state["velocity"]
        return velocity


def _trust_ratios(weights: list[Tensor], updates: Iterable[Tensor], trust: float) -> list[Tensor]:
    sizes = torch.stack(list(torch._foreach_norm(weights)))
    steps = torch.stack(list(torch._foreach_norm(list(updates))))
    ratios = torch.where((sizes > 0) & (steps > 0), trust * sizes / steps, 1.0)
    return list(ratios.unbind())

"""Solve multinomial logistic regression for many classifiers at once: the probes use it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eval.finite import finite_float32

SGD_MOMENTUM = 0.9
STABLE_RATE = 3.8
"""Largest learning rate, relative to the curvature bound, that is stable: 2 * (1 + SGD_MOMENTUM)."""


@dataclass(frozen=True)
class Standardiser:
    """Standardise features by the mean and scale of the training features; constant dimensions become 0.

    Attributes:
        mean: Mean of each dimension.
        scale: One over its standard deviation, 0 where that is (nearly) 0.
    """

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    @classmethod
    def fit(cls, features: Float[Tensor, "n d"]) -> "Standardiser":
        """Measure ``features``, of any float dtype.

        Raises:
            UserError: a row is not finite.
        """
        std, mean = torch.std_mean(finite_float32(features, "training features"), dim=0, correction=0)
        alive = std > 1e-6 * std.max().clamp_min(torch.finfo(std.dtype).tiny)
        return cls(mean, torch.where(alive, 1 / std, 0.0))

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ``(features - mean) * scale``, in float32."""
        return (features.float() - self.mean) * self.scale


@dataclass(frozen=True)
class LinearClassifiers:
    """Trained linear classifiers: one for each of h settings.

    Attributes:
        weight: Weight of each feature, class and classifier.
        bias: Bias of each class and classifier.
    """

    weight: Float[Tensor, "d c h"]
    bias: Float[Tensor, "c h"]

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c h"]:
        """Return the logits of each row, class and classifier."""
        flat = torch.addmm(self.bias.flatten(), features, self.weight.flatten(1))
        return flat.view(len(features), *self.bias.shape)


def train_classifiers(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    *,
    learning_rates: Float[Tensor, " h"],
    weight_decays: Float[Tensor, " h"],
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> LinearClassifiers:
    """Minimise ``mean cross-entropy + weight_decay / 2 * |weight|^2`` for each classifier (the bias is free).

    Plain SGD is slow here because features correlate. So the rows are rotated to their principal axes,
    which changes neither logits nor the penalty, and each axis has its own step size: ``learning_rate /
    (variance / 2 + weight_decay)``, the inverse of Böhning's bound on the curvature (1992, Ann. Inst.
    Statist. Math. 44, 197-200). With heavy-ball momentum of 0.9 a rate of 0.1 adds up to the full step;
    up to 3.8 is stable. The rate falls along a cosine to 0, which averages out the noise of mini-batches.

    At low weight decays the step count regularises: see ``LinearConfig.min_steps``.

    Args:
        features: Standardised rows, float32.
        labels: Classes in [0, num_classes).
        num_classes: c.
        learning_rates: See LinearConfig.
        weight_decays: Above 0.
        steps: Optimizer steps.
        batch_size: Rows of a step; all of them if there are no more.
        seed: Seed of the row order; without effect if a step takes all rows.

    Returns:
        The classifiers, in the order of the settings. One that diverged holds values that are not finite.
    """
    axes, variance = _principal_axes(features)
    rows = features @ axes
    target = F.one_hot(labels, num_classes).to(rows.dtype)[:, :, None]
    step_size = learning_rates / (variance[:, None] / 2 + weight_decays).clamp_min(1e-12)
    weight = rows.new_zeros(rows.shape[1], num_classes, len(weight_decays))
    bias = rows.new_zeros(num_classes, len(weight_decays))
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, batch in enumerate(_batches(len(rows), batch_size, steps, seed, rows.device)):
        x = rows if batch is None else rows[batch]
        # Classes before classifiers: a softmax over the last, short axis takes ten times as long on a CPU.
        error = LinearClassifiers(weight, bias).logits(x).softmax(1)
        error -= target if batch is None else target[batch]
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        weight_grad = (x.T @ error.flatten(1)).view_as(weight).div_(len(x)).addcmul_(weight, weight_decays)
        weight_speed.mul_(SGD_MOMENTUM).add_(weight_grad)
        bias_speed.mul_(SGD_MOMENTUM).add_(error.mean(0))
        weight.addcmul_(weight_speed, step_size[:, None], value=-rate)
        bias.addcmul_(bias_speed, learning_rates, value=-2 * rate)  # the bias's own curvature bound is 1/2
    return LinearClassifiers((axes @ weight.flatten(1)).view(-1, *weight.shape[1:]), bias)


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal axes that span the rows, (d, r), and the rows' mean square along each, (r)."""
    n, d = features.shape
    if n < d:  # the solution lies in the span of the rows, so n axes lose nothing
        _, scale, axes = torch.linalg.svd(features, full_matrices=False)
        return axes.T.contiguous(), scale.square() / n
    variance, axes = torch.linalg.eigh((features.T @ features / n).double().cpu())
    return axes.to(features), variance.clamp_min(0).to(features)


def _batches(
    rows: int, batch_size: int, steps: int, seed: int, device: torch.device
) -> "list[Tensor | None]":
    """Return the row numbers of each step; None is all rows. An incomplete last batch is dropped."""
    if rows <= batch_size:
        return [None] * steps
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor | None] = []
    while len(batches) < steps:
        order = torch.randperm(rows, generator=generator).to(device)
        batches += [batch for batch in torch.split(order, batch_size) if len(batch) == batch_size]
    return batches[:steps]

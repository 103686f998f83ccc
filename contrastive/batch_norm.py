"""Batch-norm variants that stop the network from recognising a key by the batch statistics it shares.

Query and key of an image are normalised with statistics of the same few images, negatives from the bank with
those of others. A network learns to recognise that before it learns what the images show (MoCo, He et al.
2020, arXiv:1911.05722, section 3.3). Remedies: one set of statistics for all devices (``sync``), or small
groups with keys in other groups than their queries (``shuffle`` over devices, ``split`` also on one device).
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memory_bank.draw import mix, noise

#: Stream of the draws of ``shuffled``; those of the miner use the small numbers.
_SHUFFLE_STREAM = 1_000


class SplitBatchNorm(_BatchNorm):
    """Batch norm over groups of the batch, like plain batch norm on that many devices.

    The single-GPU variant of MoCo's batch norm (its CIFAR-10 demo, github.com/facebookresearch/moco). Running
    statistics are updated by the mean over the groups. Evaluation and state dict equal plain batch norm's.

    Args:
        norm: Layer to replace; its parameters and statistics are reused.
        num_splits: Number of groups, contiguous, of nearly equal size; fewer if a group would have one row.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm, num_splits: int) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.num_splits = num_splits
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)
        for name, part in norm.named_children():  # timm's batch norms end in dropout and an activation
            setattr(self, name, part)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any ``(b, c, ...)``, so that one class serves encoder and heads."""

    def forward(self, input: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Normalise each group separately; in evaluation, all rows by the running statistics."""
        normalised = self._normalised_groups(input) if self.training else super().forward(input)
        for part in self.children():
            normalised = part(normalised)
        return normalised

    def _normalised_groups(self, input: Tensor) -> Tensor:
        assert self.momentum is not None
        groups = input.tensor_split(max(1, min(self.num_splits, len(input) // 2)))
        means, variances = (buffer.repeat(len(groups), 1) for buffer in (self.running_mean, self.running_var))
        parts = [
            F.batch_norm(group, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for group, mean, variance in zip(groups, means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


class BufferSnapshot:
    """Snapshot of a module's buffers, to undo what a forward pass did to them.

    Training never reads running statistics, so damage by a batch that is not finite would stay unnoticed.

    Args:
        module: Module on its training device; moving it would replace its buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        # One list per dtype: a list of mixed dtypes would be copied with one kernel per tensor.
        self._lists = [(live, [buffer.clone() for buffer in live]) for live in by_dtype.values()]

    def keep(self) -> None:
        """Save the current buffers."""
        for live, copies in self._lists:
            torch._foreach_copy_(copies, live)

    def restore(self) -> None:
        """Restore the buffers saved last, by ``keep`` or on construction."""
        for live, copies in self._lists:
            torch._foreach_copy_(live, copies)


def convert(module: nn.Module, kind: str, num_splits: int) -> None:
    """Replace, in place, the batch norms inside ``module``; the state dict does not change.

    Args:
        module: A module that is not itself a batch norm.
        kind: As ``encoder.batch_norm``; ``plain`` and ``shuffle`` replace nothing.
        num_splits: Number of groups of ``split``.
    """
    if kind == "sync":
        # timm's function also knows its own batch norms with an activation; importing timm takes a second.
        import_module("timm.layers").convert_sync_batchnorm(module)
    if kind == "split":
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SplitBatchNorm(child, num_splits))
            else:
                convert(child, kind, num_splits)


def shuffled(ids: Int[Tensor, " g"], seed: int, step: int) -> Int[Tensor, " g"]:
    """Return a random order of a batch; a pure function of its arguments, so all ranks agree on it.

    Args:
        ids: Data set rows of the whole batch, in order of rank.
        seed: Seed of the run.
        step: Optimizer step.

    Returns:
        Positions in ``ids``, each once.
    """
    return noise(ids, mix(seed, step, _SHUFFLE_STREAM)).argsort(stable=True)

"""Whose statistics batch norm uses: a key must not be told from the company it was normalised in.

Query and key of an image are normalised with statistics of the same few images, negatives out of the bank
with those of others. A network finds that before it finds what is in the pictures (MoCo, He et al. 2020,
arXiv:1911.05722, section 3.3). Against it: one set of statistics for all devices (``sync``), or small groups
and keys computed in other groups than their queries (``shuffle`` over devices, ``split`` also on one).
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
    """Batch norm over groups of the batch, as that many devices would do it.

    The single-GPU variant of MoCo's batch norm (its CIFAR-10 demo, github.com/facebookresearch/moco). Running
    statistics move by the mean over the groups. Evaluation is plain batch norm's, and so is the state dict.

    Args:
        norm: Layer to replace; its parameters and statistics are taken over.
        num_splits: Groups, contiguous and as equal as can be; fewer where a group would have one row.
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
        """Any ``(b, c, ...)`` will do, so that one class serves encoder and heads."""

    def forward(self, input: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Normalise each group by itself; in evaluation all rows by the running statistics."""
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
    """The buffers of ``module``, so that what a forward pass did to them can be undone.

    Training never reads running statistics, so one batch that is not finite would stay in them unseen.

    Args:
        module: On its training device; moving it would replace its buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        # Apart by type: a list of several would be copied by a kernel for each tensor.
        self._lists = [(held, [buffer.clone() for buffer in held]) for held in by_dtype.values()]

    def keep(self) -> None:
        """Remember the buffers as they are."""
        for held, kept in self._lists:
            torch._foreach_copy_(kept, held)

    def restore(self) -> None:
        """Make them again what they were when last kept, or at the start."""
        for held, kept in self._lists:
            torch._foreach_copy_(held, kept)


def convert(module: nn.Module, kind: str, num_splits: int) -> None:
    """Replace, in place, the batch norms (if any) inside ``module``; names and values in its state dict stay.

    Args:
        module: Not itself a batch norm.
        kind: As ``encoder.batch_norm``; ``plain`` and ``shuffle`` replace nothing.
        num_splits: Groups of ``split``.
    """
    if kind == "sync":
        # timm's knows its batch norms with an activation, too; a second of import that most runs do without.
        import_module("timm.layers").convert_sync_batchnorm(module)
    if kind == "split":
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SplitBatchNorm(child, num_splits))
            else:
                convert(child, kind, num_splits)


def shuffled(ids: Int[Tensor, " g"], seed: int, step: int) -> Int[Tensor, " g"]:
    """A random order of the rows of a batch; a pure function of its arguments, so all ranks agree on it.

    Args:
        ids: Data set rows of the whole batch, by rank.
        seed: Of the run.
        step: Optimizer step.

    Returns:
        Positions in ``ids``, each once.
    """
    return noise(ids, mix(seed, step, _SHUFFLE_STREAM)).argsort(stable=True)

"""Collectives for training; each is the identity when no process group is initialised.

Ranks may hold different numbers of rows (an image could not be read): gathers pad to the longest rank
and remove the padding again. ``sizes`` from one ``gather_sizes`` can be used for all gathers of a step.
All functions are collective: every rank must call them, in the same order.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

_entered = 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_entered() -> int:
    """Return how many collectives this process has entered; equal on ranks that are in step."""
    return _entered


def note_entry(group: Any = None) -> None:
    """Count one collective call. A rank with a lower count is the one the others are waiting for.

    Calls in a group of their own are not counted: another thread makes them, at any time.
    """
    global _entered
    _entered += group is None


def gather_sizes(rows: int, device: torch.device, group: Any = None) -> list[int]:
    """Gather the number of rows of each rank, by rank; waits for the device."""
    if world_size() == 1:
        return [rows]
    note_entry(group)
    sizes = torch.empty(world_size(), dtype=torch.int64, device=device)
    _gather_single(sizes, torch.tensor([rows], dtype=torch.int64, device=device), group)
    return [int(size) for size in sizes.tolist()]


def zero_of(weights: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Return 0 with a gradient of 0 for each weight, for which DDP waits if nothing else depends on it."""
    # Sums over no element: 0 times a weight would not be 0 for a weight that is not finite.
    return torch.stack([weight[:0].sum() for weight in weights]).sum()


@torch.no_grad()
def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None, group: Any = None) -> Tensor:
    """Gather the rows of all ranks, in order of rank, without gradient.

    Args:
        rows: ``(b, ...)`` of any dtype; b may differ between ranks and be 0, the rest may not.
        sizes: Every rank's b, if the caller already has it.
        group: Process group of all ranks; None is the default one.

    Returns:
        ``(g, ...)`` with g the sum of all b; detached, and ``rows`` itself in a single process.
    """
    if world_size() == 1:
        return rows.detach()
    return _gather(rows.detach(), sizes or gather_sizes(len(rows), rows.device, group), group)


@torch.no_grad()
def rows_of_first_rank(rows: Tensor) -> Tensor:
    """Return rank 0's ``rows`` on every rank; elsewhere only dtype, shape and device of ``rows`` count."""
    if world_size() == 1:
        return rows
    note_entry()
    sent = _on_backend_device(rows).clone()
    dist.broadcast(sent, src=0)
    return sent.to(rows.device)


def mean_weight(sizes: Sequence[int]) -> float:
    """Return the factor for this rank's mean loss that makes the mean over ranks the mean over all rows.

    DDP averages gradients over ranks with equal weight, however many rows each has. The factor is 1 if all
    have the same number.

    Args:
        sizes: Every rank's b; not all 0.
    """
    return sizes[rank()] * len(sizes) / sum(sizes)


def gather_with_grad(rows: Float[Tensor, "b d"], sizes: Sequence[int] | None = None) -> Float[Tensor, "g d"]:
    """Gather the rows of all ranks, with gradient: that of a row is summed over all ranks.

    DDP optimises the mean of the ranks' losses. If each rank multiplies its mean loss by ``mean_weight``,
    gradients equal those of one process on the joined batch.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherWithGrad.apply(rows, tuple(sizes or gather_sizes(len(rows), rows.device)))
    return gathered


def all_true(flag: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Return, elementwise, whether ``flag`` is true on every rank; on its device, equal on all ranks."""
    if world_size() == 1:
        return flag
    note_entry()
    agreed = flag.to(torch.int32)  # not every backend reduces booleans
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return agreed.bool()


def on_any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank."""
    return not bool(all_true(_on_backend_device(torch.tensor(not flag))))


def from_first_rank(number: int, device: torch.device) -> int:
    """Return rank 0's ``number`` on every rank; waits for the device if there are several."""
    if world_size() == 1:
        return number
    return int(gather_rows(torch.tensor([number], device=device), [1] * world_size())[0])


@dataclass(frozen=True)
class Rows:
    """The images of a micro-batch, on this rank and on all, as data set rows.

    Attributes:
        ids: Data set rows of this rank's images.
        all_ids: Data set rows of all ranks' images, in order of rank.
        sizes: Every rank's b.
    """

    ids: Int[Tensor, " b"]
    all_ids: Int[Tensor, " g"]
    sizes: list[int]

    @classmethod
    def of(cls, ids: Int[Tensor, " b"]) -> "Rows":
        """Gather the rows of all ranks. Collective."""
        sizes = gather_sizes(len(ids), ids.device)
        return cls(ids, gather_rows(ids, sizes), sizes)

    def own(self, values: Float[Tensor, "g ..."] | Int[Tensor, "g ..."]) -> Tensor:
        """Return this rank's part of ``values``, one for each row of ``all_ids``."""
        return torch.split(values, self.sizes)[rank()]


class Collectives:
    """The memory_bank.exchange.Exchange over the default process group; a single process without one.

    NCCL cannot send host memory: host tensors are copied to the device first. A thread other than the one
    that made this object communicates in a gloo group of its own, through host memory: ranks need not
    interleave the calls of their threads alike.

    Args:
        rank: Rank of this process, if the process group does not exist yet; None asks the group.
        world: Number of processes, if the process group does not exist yet; None asks the group.
    """

    def __init__(self, rank: int | None = None, world: int | None = None) -> None:
        self._rank, self._world = rank, world
        self._home = threading.get_ident()
        self._apart: Any = None

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return rank() if self._rank is None else self._rank

    @property
    def world(self) -> int:
        """Return the number of processes."""
        return self._world or world_size()

    def gather(self, rows: Tensor) -> list[Tensor]:
        """See Exchange."""
        group = self._group()
        sent = _on_backend_device(rows, group)
        sizes = gather_sizes(len(sent), sent.device, group)
        return list(torch.split(gather_rows(sent, sizes, group).to(rows.device), sizes))

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See Exchange."""
        if world_size() == 1:
            return list(parts)
        group, home = self._group(), parts[0].device
        sent = _on_backend_device(torch.cat(list(parts)).contiguous(), group)
        row = math.prod(sent.shape[1:]) * sent.element_size()
        sizes = torch.tensor([len(part) for part in parts], device=sent.device)
        incoming = torch.empty_like(sizes)
        note_entry(group)
        dist.all_to_all_single(incoming, sizes, group=group)
        num_sent, num_received = sizes.tolist(), incoming.tolist()
        # As bytes: not every backend moves every dtype.
        received = torch.empty(sum(num_received), row, dtype=torch.uint8, device=sent.device)
        as_bytes = sent.view(torch.uint8).reshape(len(sent), row)
        dist.all_to_all_single(received, as_bytes, num_received, num_sent, group=group)
        whole = received.view(sent.dtype).reshape(len(received), *sent.shape[1:]).to(home)
        return list(torch.split(whole, num_received))

    def total(self, values: Tensor) -> Tensor:
        """See Exchange."""
        if world_size() == 1:
            return values
        group = self._group()
        note_entry(group)
        summed = _on_backend_device(values, group).clone()
        dist.all_reduce(summed, group=group)
        return summed.to(values.device)

    def _group(self) -> Any:
        """Return the process group of the calling thread; None is the default one."""
        if threading.get_ident() == self._home or world_size() == 1:
            return None
        if self._apart is None:  # the first call of the other thread, as on all ranks
            self._apart = dist.new_group(backend="gloo")
        return self._apart


def _on_backend_device(tensor: Tensor, group: Any = None) -> Tensor:
    """Copy ``tensor`` to CUDA if the backend is NCCL, to the host if the group is a thread's, of gloo."""
    if group is not None:
        return tensor.cpu()
    alone = world_size() == 1 or dist.get_backend() != "nccl"
    return tensor if alone or tensor.is_cuda else tensor.cuda()


def wait_for_all() -> None:
    """Wait until every rank gets here: a launcher may kill the rest as soon as one process ends."""
    if world_size() > 1:
        dist.barrier()


def _gather_single(gathered: Tensor, rows: Tensor, group: Any = None) -> None:
    # Later releases of torch have the first name, and warn about the second.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, rows, group=group)


def _gather(rows: Tensor, sizes: Sequence[int], group: Any = None) -> Tensor:
    note_entry(group)
    longest = max(sizes)
    boolean = rows.dtype == torch.bool  # not every backend moves booleans
    padded = _pad(rows.to(torch.uint8) if boolean else rows, longest)
    gathered = padded.new_empty(len(sizes) * longest, *rows.shape[1:])
    _gather_single(gathered, padded, group)
    if min(sizes) < longest:
        gathered = gathered[_occupied(sizes, longest, rows.device)]
    return gathered.bool() if boolean else gathered


def _pad(rows: Tensor, longest: int) -> Tensor:
    missing = longest - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()


def _occupied(sizes: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """Return the mask of rows that are not padding."""
    filled = torch.tensor(sizes, device=device)[:, None]
    return (torch.arange(longest, device=device) < filled).flatten()


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return _gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # gloo has no reduce-scatter; (g, d) is small, so all ranks reduce all of it and keep their part.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]], None

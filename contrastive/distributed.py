"""Collectives that training needs; each is the identity when no process group is initialised.

Ranks may hold different numbers of rows (an image could not be read): gathers pad to the longest rank
and cut the padding out again. ``sizes`` from one ``gather_sizes`` serves several gathers of a step.
All functions are collective: every rank must call them, in the same order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

_entered = 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_entered() -> int:
    """Collectives that this process noted so far; the same on ranks that are in step."""
    return _entered


def note_entry() -> None:
    """Count a collective that is entered now: who entered fewer than the others is whom they wait for."""
    global _entered
    _entered += 1


def gather_sizes(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank holds, by rank; waits for the device."""
    if world_size() == 1:
        return [rows]
    note_entry()
    sizes = torch.empty(world_size(), dtype=torch.int64, device=device)
    _gather_single(sizes, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(size) for size in sizes.tolist()]


@torch.no_grad()
def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, by rank, without gradient.

    Args:
        rows: ``(b, ...)`` of any dtype; b may differ between ranks and be 0, the rest may not.
        sizes: Every rank's b, when the caller has it already.

    Returns:
        ``(g, ...)`` with g the sum of all b; detached, and ``rows`` itself in a single process.
    """
    if world_size() == 1:
        return rows.detach()
    return _gather(rows.detach(), sizes or gather_sizes(len(rows), rows.device))


def mean_weight(sizes: Sequence[int]) -> float:
    """Factor for this rank's mean over its rows, so that the mean over ranks is the mean over all rows.

    DDP averages gradients over ranks with equal weight, however many rows each holds. 1 where all hold as
    many.

    Args:
        sizes: Every rank's b; not all 0.
    """
    return sizes[rank()] * len(sizes) / sum(sizes)


def gather_with_grad(rows: Float[Tensor, "b d"], sizes: Sequence[int] | None = None) -> Float[Tensor, "g d"]:
    """As ``gather_rows``; each row's gradient is the sum of what all ranks did with it.

    With the mean of the ranks' losses as the objective, which is what DDP optimises, gradients equal
    those of one process on the joined batch, once each rank's mean is multiplied by its ``mean_weight``.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherWithGrad.apply(rows, tuple(sizes or gather_sizes(len(rows), rows.device)))
    return gathered


def all_true(flag: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Whether ``flag`` holds on every rank, each of several by itself; the same everywhere, on its device."""
    if world_size() == 1:
        return flag
    note_entry()
    agreed = flag.to(torch.int32)  # not every backend reduces booleans
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return agreed.bool()


class Collectives:
    """The memory_bank.sharded.Exchange of the default process group; alone without one.

    NCCL moves nothing of the host: what lives there travels by the device.

    Args:
        world: Processes that there will be, to plan for them; None are those there are.
    """

    def __init__(self, world: int | None = None) -> None:
        self._world = world

    @property
    def rank(self) -> int:
        """This process."""
        return rank()

    @property
    def world(self) -> int:
        """Processes in all."""
        return self._world or world_size()

    def gather(self, rows: Tensor) -> list[Tensor]:
        """See Exchange."""
        sizes = gather_sizes(len(rows), _road(rows).device)
        return list(torch.split(gather_rows(_road(rows), sizes).to(rows.device), sizes))

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See Exchange."""
        if world_size() == 1:
            return list(parts)
        sent = torch.cat(list(parts)).contiguous()
        row = math.prod(sent.shape[1:]) * sent.element_size()
        sizes = torch.tensor([len(part) for part in parts], device=_road(sent).device)
        incoming = torch.empty_like(sizes)
        note_entry()
        dist.all_to_all_single(incoming, sizes)
        given, wanted = sizes.tolist(), incoming.tolist()
        # As bytes: not every backend moves every dtype.
        received = torch.empty(sum(wanted), row, dtype=torch.uint8, device=_road(sent).device)
        carried = _road(sent).view(torch.uint8).reshape(len(sent), row)
        dist.all_to_all_single(received, carried, wanted, given)
        whole = received.view(sent.dtype).reshape(len(received), *sent.shape[1:]).to(sent.device)
        return list(torch.split(whole, wanted))

    def total(self, values: Tensor) -> Tensor:
        """See Exchange."""
        if world_size() == 1:
            return values
        note_entry()
        summed = _road(values).clone()
        dist.all_reduce(summed)
        return summed.to(values.device)


def _road(tensor: Tensor) -> Tensor:
    """``tensor`` where the process group can reach it."""
    alone = world_size() == 1 or dist.get_backend() != "nccl"
    return tensor if alone or tensor.is_cuda else tensor.cuda()


def wait_for_all() -> None:
    """Until every rank is here: a launcher may end the rest as soon as one has ended."""
    if world_size() > 1:
        dist.barrier()


def _gather_single(gathered: Tensor, rows: Tensor) -> None:
    # The name in later releases of torch, which warn of the one in earlier ones.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, rows)


def _gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    note_entry()
    longest = max(sizes)
    boolean = rows.dtype == torch.bool  # not every backend moves booleans
    padded = _pad(rows.to(torch.uint8) if boolean else rows, longest)
    gathered = padded.new_empty(len(sizes) * longest, *rows.shape[1:])
    _gather_single(gathered, padded)
    if min(sizes) < longest:
        gathered = gathered[_occupied(sizes, longest, rows.device)]
    return gathered.bool() if boolean else gathered


def _pad(rows: Tensor, longest: int) -> Tensor:
    missing = longest - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()


def _occupied(sizes: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """Mask over the padded rows of all ranks."""
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

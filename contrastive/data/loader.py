"""From the plan to batches: images kept on the device where they fit, decoded by processes where not."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import DataConfig
from contrastive.data.batch import Batch
from contrastive.data.cache import cached
from contrastive.data.images import Images
from contrastive.data.plan import Plan
from contrastive.data.reading import (
    MOST_WORKERS,
    Decoded,
    Report,
    decode_ahead,
    decode_all,
    num_bytes,
    usable_cpus,
)
from contrastive.data.tally import Tally
from memory_bank.transfer import send

RESIDENT_BYTES = 2**30  # sets up to this size stay on the device under data.resident=auto


class Loader(ABC):
    """Micro-batches of one rank, in the plan's order; iterating yields the rest of the current epoch.

    With ``whole_plan`` it yields the rest of the plan instead: one pass over all epochs.

    The number of batches is exact whatever the files are like: rows that cannot be read are left out of
    their batch, and one of which none can be read is delivered with 0 rows.

    Args:
        plan: The order.
        rank: This process.
        world: Processes in all.
        accumulate: Micro-batches of one optimizer step.
        start_step: Optimizer steps already done.
        whole_plan: A pass is the plan, not an epoch.

    Raises:
        UserError: the global batch does not divide evenly.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int,
        world: int,
        accumulate: int,
        start_step: int = 0,
        whole_plan: bool = False,
    ) -> None:
        plan.share(world, accumulate)
        self._plan, self._rank, self._world, self._accumulate = plan, rank, world, accumulate
        self._epochs_a_pass = plan.epochs if whole_plan else 1
        self._delivered = 0
        self.load_state_dict({"delivered": start_step * accumulate})

    def __len__(self) -> int:
        """Micro-batches of a pass: an epoch or the plan, whether or not part of it is done."""
        return self._plan.steps_per_epoch * self._accumulate * self._epochs_a_pass

    def __iter__(self) -> Iterator[Batch]:
        end = min((self._delivered // len(self) + 1) * len(self), self._total)
        while self._delivered < end:
            batch = self._next()
            # Counted when handed out, not when fetched: after a resume, workers prepare the rest again.
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Micro-batches handed out since the start of the run, by this rank as by every other."""
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after ``state["delivered"]`` micro-batches.

        Raises:
            ValueError: not in 0 to the plan's total.
        """
        if not 0 <= state["delivered"] <= self._total:
            raise ValueError(
                f"delivered={state['delivered']}: the plan has {self._total} micro-batches "
                f"({self._plan.total_steps} steps x {self._accumulate})"
            )
        self._delivered = state["delivered"]

    def judge(self, read: Int[Tensor, " g"]) -> None:  # noqa: B027  # where all ranks read all, nothing is left
        """Count what could not be read of the micro-batch handed out last, over all ranks; call it on all.

        Args:
            read: Rows that the ranks got, on any device.

        Raises:
            TooManyCorrupt: on all ranks alike.
        """

    def close(self) -> None:  # noqa: B027  # nothing to end is the common case
        """End worker processes; the loader may be used again afterwards."""

    @property
    def _total(self) -> int:
        return self._plan.total_steps * self._accumulate

    def _ids(self, position: int) -> Int[Tensor, " b"]:
        step, micro = divmod(position, self._accumulate)
        return self._plan.local_ids(step, micro, self._rank, self._world, self._accumulate)

    @abstractmethod
    def _next(self) -> Batch:
        """Micro-batch number ``self._delivered``."""


class ResidentLoader(Loader):
    """All images decoded once and kept on the device; a batch is one ``index_select``.

    Args:
        images: The data set.
        plan: See Loader.
        device: Where batches are wanted.
        tally: Judges the unreadable ones, all of them at once.
        progress: Show a bar on stderr while decoding.
        kwargs: See Loader.
    """

    def __init__(
        self, images: Images, plan: Plan, *, device: torch.device, tally: Tally, progress: bool, **kwargs: Any
    ) -> None:
        super().__init__(plan, **kwargs)
        pixels, bad = decode_all(images, progress=progress)
        tally.add(torch.arange(len(images)), sorted(bad.items()))
        self._readable = torch.ones(len(images), dtype=torch.bool)
        self._readable[list(bad)] = False
        self._pixels = pixels.to(device)

    def _next(self) -> Batch:
        ids = self._ids(self._delivered)
        ids = send(ids[self._readable[ids]], self._pixels.device)
        return Batch(self._pixels.index_select(0, ids), ids)


class StreamLoader(Loader):
    """Images decoded by worker processes, ahead of their use and across the border of an epoch.

    Batches come in host memory, pinned for a GPU.

    Args:
        images: The data set.
        plan: See Loader.
        device: Where batches are going.
        tally: Judges the unreadable ones as they appear.
        num_workers: Decoding processes; 0 decodes in this one.
        kwargs: See Loader.
    """

    def __init__(
        self,
        images: Images,
        plan: Plan,
        *,
        device: torch.device,
        tally: Tally,
        num_workers: int,
        **kwargs: Any,
    ) -> None:
        self._images, self._device, self._tally, self._num_workers = images, device, tally, num_workers
        self._stream: Iterator[Decoded] | None = None
        super().__init__(plan, **kwargs)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See Loader; what workers had ready is thrown away."""
        super().load_state_dict(state)
        self.close()

    def close(self) -> None:
        """See Loader."""
        self._stream = None  # its workers end when the iterator is collected

    def _next(self) -> Batch:
        if self._stream is None:
            todo = (self._ids(position).tolist() for position in range(self._delivered, self._total))
            self._stream = decode_ahead(self._images, todo, self._num_workers, self._device)
        decoded = next(self._stream)
        if self._world == 1:
            self._tally.add(decoded.asked, decoded.bad)
        else:
            self._tally.tell(decoded.bad)  # to stop here would leave the other ranks waiting: see judge
        return decoded.batch

    def judge(self, read: Int[Tensor, " g"]) -> None:
        """See Loader."""
        if self._world == 1:
            return
        step, micro = divmod(self._delivered - 1, self._accumulate)
        place = (self._world, self._accumulate)
        shares = [self._plan.local_ids(step, micro, rank, *place) for rank in range(self._world)]
        asked = torch.cat(shares)
        # The usual case needs no look at the rows, which would wait for the device.
        self._tally.add_global(asked, asked if len(read) == len(asked) else read.cpu())


def build_loader(
    images: Images,
    plan: Plan,
    data: DataConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    on_corrupt: Report,
    start_step: int = 0,
    whole_plan: bool = False,
    progress: bool = False,
) -> Loader:
    """The loader that suits the size of the data set and ``data.resident``.

    Args:
        images: The data set, ``plan.rows`` of them.
        plan: The order.
        data: resident, cache, num_workers, max_corrupt are read.
        device: Where the network is.
        rank: This process.
        world: Processes in all.
        accumulate: Micro-batches of one optimizer step.
        on_corrupt: Called in this process, once for each unreadable row, with the reason.
        start_step: Optimizer steps already done.
        whole_plan: Iterating yields the rest of the plan, not of the epoch.
        progress: Show a bar on stderr while a whole set is decoded.

    Raises:
        UserError: the batch does not divide evenly, no image can be read, not enough memory or disk.
        TooManyCorrupt: here for a resident set, while iterating for others.
    """
    if len(images) != plan.rows:
        raise ValueError(f"plan.rows={plan.rows}, but there are {len(images)} images")
    if data.cache is not None:
        images = cached(images, Path(data.cache).expanduser(), progress=progress)
    tally = Tally(images, data.max_corrupt, on_corrupt)
    place = {
        "rank": rank,
        "world": world,
        "accumulate": accumulate,
        "start_step": start_step,
        "whole_plan": whole_plan,
    }
    if is_resident(images, data):
        return ResidentLoader(images, plan, device=device, tally=tally, progress=progress, **place)
    workers = default_workers(world) if data.num_workers is None else data.num_workers
    return StreamLoader(images, plan, device=device, tally=tally, num_workers=workers, **place)


def is_resident(images: Images, data: DataConfig) -> bool:
    """Whether the decoded set is kept on the device: as ``data.resident`` says, or by its size."""
    if data.resident == "auto":
        return num_bytes(images) <= RESIDENT_BYTES
    return data.resident == "true"


def default_workers(world: int) -> int:
    """Decoding processes for each of ``world`` ranks: the processors it may use, at most 16."""
    if "SLURM_CPUS_PER_TASK" in os.environ:  # there, the processors seen are this rank's own
        return min(MOST_WORKERS, int(os.environ["SLURM_CPUS_PER_TASK"]))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, torch.cuda.device_count() or world)))
    return max(1, min(MOST_WORKERS, usable_cpus() // local))

"""Load batches in the plan's order: from the device if the decoded set fits, else by worker processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import DataConfig, UserError, launcher_number
from contrastive.data.batch import Batch
from contrastive.data.cache import cached
from contrastive.data.clips import AllFrames, DrawnClips, StoredFrames, fits
from contrastive.data.crops import CroppedImages
from contrastive.data.decode import SourceLost
from contrastive.data.images import Images
from contrastive.data.plan import WHOLE, Plan, Share
from contrastive.data.reading import (
    MOST_WORKERS,
    BatchRows,
    Decoded,
    Report,
    decode,
    decode_ahead,
    decode_all,
    num_bytes,
    usable_cpus,
)
from contrastive.data.tally import Tally
from memory_bank.transfer import to_device

RESIDENT_BYTES = 2**30  # sets up to this size stay on the device under data.resident=auto


class Loader(ABC):
    """Yields the micro-batches of one rank, in the plan's order; iterating yields the rest of the plan.

    Unreadable files do not change the number of batches: rows that cannot be read are left out of their
    batch, and a batch without a readable row is delivered with 0 rows.

    Args:
        plan: Rows of each step.
        share: The part of each batch that this process takes.

    Raises:
        UserError: the global batch does not divide evenly.
    """

    def __init__(self, plan: Plan, share: Share) -> None:
        plan.local_batch(share)
        self._plan, self._share = plan, share
        self._delivered = 0

    def __len__(self) -> int:
        """Count the micro-batches of the whole plan, including those already delivered."""
        return self._plan.total_steps * self._share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        try:
            while self._delivered < len(self):
                batch = self._next()
                # Counted when delivered, not when prefetched: a resume must decode those again.
                self._delivered += 1
                yield batch
        finally:
            self.close()

    def state_dict(self) -> dict[str, int]:
        """Return the number of micro-batches delivered since the start of the run; equal on all ranks."""
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``state["delivered"]`` micro-batches.

        Raises:
            ValueError: the number is not in 0 to the plan's total.
        """
        if not 0 <= state["delivered"] <= len(self):
            raise ValueError(
                f"delivered={state['delivered']}: the plan has {len(self)} micro-batches "
                f"({self._plan.total_steps} steps x {self._share.accumulate})"
            )
        self._delivered = state["delivered"]

    def check_corrupt_share(self, read: Int[Tensor, " g"], on_any_rank: Callable[[bool], bool]) -> None:  # noqa: B027  # a resident set is checked when decoded
        """Compare the rows asked for in the last micro-batch with those read; enforce data.max_corrupt.

        Call it on every rank after each micro-batch.

        Args:
            read: Rows that all ranks could read, on any device.
            on_any_rank: Returns whether it is called with True on any rank; a collective.

        Raises:
            TooManyCorrupt: raised on all ranks at once.
            SourceLost: a rank cannot reach the images; raised on all ranks at once.
        """

    def close(self) -> None:  # noqa: B027  # most loaders have no worker
        """End worker processes; the loader may be used again afterwards."""

    def _ids(self, position: int) -> Int[Tensor, " b"]:
        step, micro = divmod(position, self._share.accumulate)
        return self._plan.local_ids(step, micro, self._share)

    def _epoch(self, position: int) -> int:
        return self._plan.epoch_of(position // self._share.accumulate)

    @abstractmethod
    def _next(self) -> Batch:
        """Return micro-batch number ``self._delivered``."""


class ResidentLoader(Loader):
    """Decodes all images once and keeps them on the device; a batch is one ``index_select``.

    Args:
        images: The data set.
        plan: See Loader.
        share: See Loader.
        device: Device of the batches.
        tally: Counts unreadable images, all at once.
        progress: Show a bar on stderr while decoding.
    """

    def __init__(
        self, images: Images, plan: Plan, share: Share, *, device: torch.device, tally: Tally, progress: bool
    ) -> None:
        super().__init__(plan, share)
        decoded = decode_all(images, progress=progress)
        tally.report(decoded.bad)
        tally.count(decoded.rows, decoded.bad)
        self._readable = decoded.readable
        self._pixels = decoded.images.to(device)

    def _next(self) -> Batch:
        ids = self._ids(self._delivered)
        ids = to_device(ids[self._readable[ids]], self._pixels.device)
        return Batch(self._pixels.index_select(0, ids), ids)


class ResidentClips(Loader):
    """Decodes all videos once and keeps all their frames on the device; a batch is one look-up.

    Args:
        images: The clips of every video.
        plan: See Loader.
        share: See Loader.
        device: Device of the batches.
        tally: Counts unreadable videos, all at once.
        progress: Show a bar on stderr while decoding.
    """

    def __init__(
        self,
        images: DrawnClips,
        plan: Plan,
        share: Share,
        *,
        device: torch.device,
        tally: Tally,
        progress: bool,
    ) -> None:
        super().__init__(plan, share)
        index = AllFrames(images)
        decoded = decode_all(index, progress=progress)
        bad = index.videos(decoded.bad)
        tally.report(bad)
        tally.count(torch.arange(len(images)), bad)
        self._readable = torch.tensor([row not in bad for row in range(len(images))])
        self._clips = StoredFrames(images, index, index)
        self._pixels = decoded.images.to(device)

    def _next(self) -> Batch:
        ids = self._ids(self._delivered)
        ids = ids[self._readable[ids]]
        places = to_device(self._clips.places(ids, self._epoch(self._delivered)), self._pixels.device)
        return Batch(self._pixels[places], to_device(ids, self._pixels.device))


class DecodingLoader(Loader):
    """Decodes images in worker processes, ahead of their use, also across the end of an epoch.

    Where the next epoch's rows are not known yet (``Plan.known_until``), it stops at the end of one, and each
    epoch starts new workers. Batches are in host memory, pinned for a GPU.

    Args:
        images: The data set.
        plan: See Loader.
        share: See Loader.
        device: Training device; a GPU means pinned memory.
        tally: Counts unreadable images as they appear.
        num_workers: Decoding processes; 0 decodes in this one.
    """

    def __init__(
        self,
        images: Images,
        plan: Plan,
        share: Share,
        *,
        device: torch.device,
        tally: Tally,
        num_workers: int,
    ) -> None:
        super().__init__(plan, share)
        self._images, self._device, self._tally, self._num_workers = images, device, tally, num_workers
        self._stream: Iterator[Decoded] | None = None
        self._lost: SourceLost | None = None

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See Loader; batches that workers had prepared are dropped."""
        super().load_state_dict(state)
        self.close()

    def close(self) -> None:
        """See Loader."""
        # Its workers end with its last reference. Left to the garbage collector, it would wait 5 s for each.
        self._stream = None

    def _next(self) -> Batch:
        try:
            decoded = self._decoded()
        except SourceLost as error:
            if self._share.world == 1:
                raise
            self._lost = error  # the other ranks wait for this one in the step: see check_corrupt_share
            return decode(self._images, []).batch
        self._tally.report(decoded.bad)
        if self._share.world == 1:  # several ranks must stop together: see check_corrupt_share
            self._tally.count(decoded.rows, decoded.bad)
        return decoded.batch

    def _decoded(self) -> Decoded:
        if self._lost is not None:
            raise self._lost
        decoded = None if self._stream is None else next(self._stream, None)
        if decoded is None:  # the first batch, or rows that were not known when the last ones were decoded
            self._stream = decode_ahead(self._images, self._coming_batches(), self._num_workers, self._device)
            decoded = next(self._stream)
        return decoded

    def _coming_batches(self) -> Iterator[BatchRows]:
        """Yield the rows of the coming micro-batches, as far as the plan knows them by then."""
        accumulate = self._share.accumulate
        for position in count(self._delivered):
            if position >= self._plan.known_until(self._delivered // accumulate) * accumulate:
                return
            yield BatchRows(self._epoch(position), self._ids(position).tolist())

    def check_corrupt_share(self, read: Int[Tensor, " g"], on_any_rank: Callable[[bool], bool]) -> None:
        """See Loader."""
        if self._share.world == 1:
            return
        step, micro = divmod(self._delivered - 1, self._share.accumulate)
        shares = (replace(self._share, rank=rank) for rank in range(self._share.world))
        asked = torch.cat([self._plan.local_ids(step, micro, share) for share in shares])
        # In the usual case that every row was read, nothing is copied from the device.
        bad = asked[:0] if len(read) == len(asked) else asked[~torch.isin(asked, read.cpu())]
        if len(bad) and on_any_rank(self._lost is not None):
            raise self._lost or SourceLost("another rank cannot reach the images; see its message")
        self._tally.count(asked, bad.tolist())


def build_loader(
    images: Images,
    plan: Plan,
    data: DataConfig,
    *,
    device: torch.device,
    share: Share = WHOLE,
    on_corrupt: Report,
    progress: bool = False,
) -> Loader:
    """Build the loader that suits the size of the data set and ``data.resident``.

    Args:
        images: The data set, of ``plan.rows`` images.
        plan: Rows of each step.
        data: Its settings resident, cache, num_workers and max_corrupt are used.
        device: Training device.
        share: The part of each batch that this process takes.
        on_corrupt: Called in this process, once for each unreadable row, with the reason.
        progress: Show a bar on stderr while a whole set is decoded.

    Raises:
        UserError: the batch does not divide evenly, no image can be read, not enough memory or disk.
        TooManyCorrupt: from here for a resident set, else while iterating.
    """
    if len(images) != plan.rows:
        raise ValueError(f"plan.rows={plan.rows}, but there are {len(images)} images")
    tally = Tally(images, data.max_corrupt, on_corrupt)
    if data.cache is not None:
        images = _from_cache(images, Path(data.cache), progress)
    if is_resident(images, data):
        if isinstance(images, DrawnClips):
            return ResidentClips(images, plan, share, device=device, tally=tally, progress=progress)
        return ResidentLoader(images, plan, share, device=device, tally=tally, progress=progress)
    workers = default_workers(share.world) if data.num_workers is None else data.num_workers
    return DecodingLoader(images, plan, share, device=device, tally=tally, num_workers=workers)


def _from_cache(images: Images, folder: Path, progress: bool) -> Images:
    """Return the images, or the clips of the frames, in a decoded array below ``folder``."""
    if not isinstance(images, DrawnClips):
        return cached(images, folder, progress=progress)
    index = AllFrames(images.source)
    return StoredFrames(images, index, cached(index, folder, progress=progress))


def is_resident(images: Images, data: DataConfig) -> bool:
    """Decide whether the decoded set is kept on the device, by ``data.resident`` or its size."""
    if isinstance(images, CroppedImages):
        return False
    if data.resident == "auto":
        return fits(images, RESIDENT_BYTES) if images.are_videos else num_bytes(images) <= RESIDENT_BYTES
    return data.resident == "true"


def choose_crop(images: Images, data: DataConfig) -> str:
    """Decide what views are cut from, by ``data.crop``: ``original`` or ``square``.

    Raises:
        UserError: ``original`` of videos, or of images that are squares alone.
    """
    possible = images.has_originals and not images.are_videos
    if data.crop == "original" and not possible:
        what = "videos" if images.are_videos else f"squares alone ({type(images).__name__})"
        raise UserError(f"data.crop=original: data.name={data.name} gives {what}; use data.crop=square")
    if data.crop != "auto":
        return data.crop
    streamed = data.cache is None and not is_resident(images, data)
    return "original" if possible and streamed and data.image_size > 64 else "square"


def default_workers(world: int) -> int:
    """Choose the decoding processes of each of ``world`` ranks: the processors it may use, at most 16."""
    if own := launcher_number("SLURM_CPUS_PER_TASK", 0):  # of this rank; it may be restricted further
        return min(MOST_WORKERS, own, usable_cpus())
    local = launcher_number("LOCAL_WORLD_SIZE", min(world, torch.cuda.device_count() or world))
    return max(1, min(MOST_WORKERS, usable_cpus() // local))

"""Decode many images: all at once in threads, or batch by batch in worker processes."""

import gc
import math
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.config import UserError, first_line
from contrastive.data.batch import Batch
from contrastive.data.decode import SourceLost, ignore_warnings
from contrastive.data.images import Images

MOST_WORKERS = 16
_BLOCK = 64  # rows of one decoding task: enough to hide its overhead, few enough for a smooth progress bar

# Called for each unreadable row, with the reason.
Report = Callable[[int, str], None]


@dataclass
class Decoded:
    """Decoded rows of a data set.

    Attributes:
        images: The pixels of each row; 0 if it could not be read.
        rows: The rows, int64.
        bad: Reason for each row that could not be read.
    """

    images: UInt8[Tensor, "n *f 3 s s"] | UInt8[Tensor, "n p"]
    rows: Int[Tensor, " n"]
    bad: dict[int, str]

    @property
    def readable(self) -> Bool[Tensor, " n"]:
        """Return whether each row could be read."""
        return torch.tensor([row not in self.bad for row in self.rows.tolist()], dtype=torch.bool)

    @property
    def batch(self) -> Batch:
        """Return the rows that could be read."""
        if not self.bad:
            return Batch(self.images, self.rows)
        return Batch(self.images[self.readable], self.rows[self.readable])

    def pin_memory(self) -> "Decoded":
        """Move the pixels to page-locked memory; called by the DataLoader's pinning thread."""
        return Decoded(self.images.pin_memory(), self.rows.pin_memory(), self.bad)


class BatchRows(NamedTuple):
    """The rows of a batch to decode, and the epoch they are read for, which chooses moments and crops."""

    epoch: int
    rows: list[int]


class WorkerDied(RuntimeError):
    """A decoding process was killed from outside, most often because memory ran out."""


def decode(images: Images, rows: Sequence[int]) -> Decoded:
    """Decode some rows, in this thread."""
    pixels = torch.zeros(len(rows), *images.shape, dtype=torch.uint8)
    bad = images.read_into(pixels, rows)
    return Decoded(pixels, torch.tensor(rows, dtype=torch.int64), bad)


def decode_all(images: Images, *, progress: bool = False) -> Decoded:
    """Decode every image, on all processors.

    Raises:
        UserError: there is not enough memory.
    """
    try:
        pixels = torch.zeros(len(images), *images.shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"{len(images)} decoded images take {num_bytes(images) / 2**30:.1f} GiB, more than can be "
            f"allocated ({error}); set data.resident=false or a smaller data.decode_size"
        ) from error
    bad: dict[int, str] = {}
    for block in decode_blocks(images, progress=progress):
        pixels[block.rows] = block.images
        bad |= block.bad
    return Decoded(pixels, torch.arange(len(images)), bad)


def decode_blocks(images: Images, *, progress: bool = False) -> Iterator[Decoded]:
    """Decode all images in order, in blocks of a few dozen."""
    blocks = (range(start, min(start + _BLOCK, len(images))) for start in range(0, len(images), _BLOCK))
    # Threads are enough: PIL releases the GIL while it decodes and resizes.
    threads = min(MOST_WORKERS, usable_cpus()) if images.thread_safe else 1
    with (
        warnings.catch_warnings(),
        tqdm(
            total=len(images),
            desc="decoding",
            unit="img",
            leave=False,
            file=sys.stderr,
            disable=None if progress else True,  # None: only on a terminal
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        ignore_warnings()
        # Not pool.map, which submits all blocks: with a slow consumer they would fill the memory.
        running = deque(pool.submit(decode, images, rows) for rows in islice(blocks, 2 * threads))
        while running:
            block = running.popleft().result()
            running.extend(pool.submit(decode, images, rows) for rows in islice(blocks, 1))
            bar.update(len(block.rows))
            yield block


def read_in_order(
    images: Images, batch_size: int, *, num_workers: int, device: torch.device, on_corrupt: Report
) -> Iterator[Batch]:
    """Decode all images once, in order of rows, for evaluation; unreadable ones only go to ``on_corrupt``.

    Batches are in host memory, pinned for a GPU.
    """
    batches = (
        BatchRows(0, list(range(at, min(at + batch_size, len(images)))))
        for at in range(0, len(images), batch_size)
    )
    for decoded in decode_ahead(images, batches, num_workers, device):
        for row, reason in decoded.bad.items():
            on_corrupt(row, reason)
        yield decoded.batch


def usable_cpus() -> int:
    """Count the processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Decoder(Dataset[Any]):
    """Decodes a list of rows inside the worker, so that there is nothing to collate."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Decoded:
        return self.__getitems__(BatchRows(0, [row]))

    def __getitems__(self, batch: BatchRows) -> Decoded:
        return decode(self._images.in_epoch(batch.epoch), batch.rows)


def decode_ahead(
    images: Images, batches: Iterable[BatchRows], num_workers: int, device: torch.device
) -> Iterator[Decoded]:
    """Decode batches in order; with workers, some batches ahead.

    Raises:
        WorkerDied: a worker process was killed.
        SourceLost: see EncodedImages.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoder(images),
        batch_sampler=batches,  # type: ignore[arg-type]  # it is passed on to __getitems__ as it is
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_init_worker,
        multiprocessing_context=_start_method() if num_workers else None,
        generator=torch.Generator(),  # else the global generator is advanced, and a resume would differ
    )
    stream = _start(loader)
    try:
        yield from stream
    except SourceLost as error:
        # From a worker it comes as the text of its traceback.
        raise SourceLost(str(error).strip().rpartition(f"{SourceLost.__name__}: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        # A broken socket may be seen before the death: tensors are sent through the worker's socket.
        cut_off = isinstance(error, OSError | EOFError) and not str(error).startswith("Caught")
        if not num_workers or not (cut_off or str(error).startswith("DataLoader worker")):
            raise
        raise WorkerDied(
            f"a decoding process was killed ({first_line(error)}); most often memory ran out: lower "
            f"data.num_workers (now {num_workers}) or data.decode_size, or enlarge /dev/shm (docker: "
            f"--shm-size); then run again to resume from the last checkpoint"
        ) from error


def _start(loader: DataLoader[Any]) -> Iterator[Decoded]:
    """Start the workers.

    torch installs a SIGCHLD handler that raises in the main thread when a worker dies, possibly in the middle
    of saving a checkpoint. It is removed again: fetching the next batch raises too, within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Python 3.12 warns about forking with threads; these children only run PIL, no torch thread pool.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        stream = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return stream


def _start_method() -> str:
    """Choose fork, which shares the list of files without a copy; spawn if fork is unsafe or missing."""
    return "fork" if sys.platform == "linux" else "spawn"


def _init_worker(number: int) -> None:
    torch.set_num_threads(1)
    ignore_warnings()
    # Terminals and clusters signal the whole process group; only the main process must react.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    gc.freeze()  # a collection would write to, and so copy, every page shared with the main process


def _as_is(batch: Any) -> Any:
    return batch


def num_bytes(images: Images) -> int:
    """Count the bytes of the decoded set."""
    return len(images) * math.prod(images.shape)

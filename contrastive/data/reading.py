"""Decoding many images: all at once by threads, or batch after batch by worker processes."""

import gc
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.config import UserError
from contrastive.data.batch import Batch
from contrastive.data.decode import ignore_warnings
from contrastive.data.images import Images

MOST_WORKERS = 16
_BLOCK = 64  # rows of one decoding task: long enough to hide its cost, short enough for a live bar

# Told each unreadable row and the reason.
Report = Callable[[int, str], None]


@dataclass
class Decoded:
    """What a worker hands over.

    Attributes:
        batch: The images that could be read.
        asked: All rows it was asked for, int64.
        bad: Row and reason of those that could not be read.
    """

    batch: Batch
    asked: Int[Tensor, " n"]
    bad: list[tuple[int, str]]

    def pin_memory(self) -> "Decoded":
        """The same, its batch in page-locked memory; called by the DataLoader's pinning thread."""
        return Decoded(self.batch.pin_memory(), self.asked, self.bad)


class WorkerDied(RuntimeError):
    """A decoding process was killed from outside, most often for memory."""


def decode_all(images: Images, *, progress: bool = False) -> tuple[UInt8[Tensor, "n 3 s s"], dict[int, str]]:
    """Every image, and the reason for each row that could not be read (whose pixels are 0).

    Raises:
        UserError: there is not enough memory.
    """
    try:
        pixels = torch.zeros(len(images), 3, images.size, images.size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"{len(images)} decoded images take {num_bytes(images) / 2**30:.1f} GiB, which cannot be had "
            f"({error}); set data.resident=false or a smaller data.decode_size"
        ) from error
    bad: dict[int, str] = {}
    start = 0
    for block, failed in decode_blocks(images, progress=progress):
        pixels[start : start + len(block)] = block
        start += len(block)
        bad.update(failed)
    return pixels, bad


def decode_blocks(
    images: Images, *, progress: bool = False
) -> Iterator[tuple[UInt8[Tensor, "b 3 s s"], list[tuple[int, str]]]]:
    """All images in order, a few dozen at a time, and the unreadable ones among them (whose pixels are 0)."""
    blocks = (range(start, min(start + _BLOCK, len(images))) for start in range(0, len(images), _BLOCK))
    # Threads suffice: PIL gives the interpreter away while it decodes and resizes.
    threads = min(MOST_WORKERS, usable_cpus()) if images.thread_safe else 1
    with (
        warnings.catch_warnings(),
        tqdm(
            total=len(images), desc="decoding", unit="img", leave=False, file=sys.stderr, disable=not progress
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        ignore_warnings()
        # Not pool.map, which would start them all: whoever writes to a slow disk would fill the memory.
        running = deque(pool.submit(_read_block, images, rows) for rows in islice(blocks, 2 * threads))
        while running:
            pixels, bad = running.popleft().result()
            running.extend(pool.submit(_read_block, images, rows) for rows in islice(blocks, 1))
            bar.update(len(pixels))
            yield pixels, bad


def read_in_order(
    images: Images, batch_size: int, *, num_workers: int, device: torch.device, on_corrupt: Report
) -> Iterator[Batch]:
    """All images once, by row, for evaluation; unreadable ones are left out and told to ``on_corrupt``.

    Batches come in host memory, pinned for a GPU.
    """
    rows = (list(range(at, min(at + batch_size, len(images)))) for at in range(0, len(images), batch_size))
    for decoded in decode_ahead(images, rows, num_workers, device):
        for row, reason in decoded.bad:
            on_corrupt(row, reason)
        yield decoded.batch


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Decoder(Dataset[Any]):
    """Turns a list of rows into a finished batch inside the worker, so that nothing is left to collate."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Decoded:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> Decoded:
        pixels = torch.empty(len(rows), 3, self._images.size, self._images.size, dtype=torch.uint8)
        bad = self._images.read_into(pixels, rows)
        ids, failed = torch.tensor(rows, dtype=torch.int64), {row for row, _ in bad}
        if failed:
            good = torch.tensor([row not in failed for row in rows])
            return Decoded(Batch(pixels[good], ids[good]), ids, bad)
        return Decoded(Batch(pixels, ids), ids, bad)


def _read_block(images: Images, rows: range) -> tuple[Tensor, list[tuple[int, str]]]:
    pixels = torch.zeros(len(rows), 3, images.size, images.size, dtype=torch.uint8)
    return pixels, images.read_into(pixels, rows)


def decode_ahead(
    images: Images, todo: Iterable[list[int]], num_workers: int, device: torch.device
) -> Iterator[Decoded]:
    """Decode the lists of rows in order, some batches ahead where there are workers.

    Raises:
        WorkerDied: a worker process was killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoder(images),
        batch_sampler=todo,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_init_worker,
        multiprocessing_context=_start_method() if num_workers else None,
        generator=torch.Generator(),  # else a word of the global stream is drawn, and a resume would differ
    )
    stream = _start(loader)
    try:
        yield from stream
    except (RuntimeError, OSError, EOFError) as error:
        # What it had sent may be found missing before its death is: tensors travel by the sender's socket.
        cut_off = isinstance(error, OSError | EOFError) and not str(error).startswith("Caught")
        if not num_workers or not (cut_off or str(error).startswith("DataLoader worker")):
            raise
        raise WorkerDied(
            f"a decoding process was killed ({_first_line(error)}); most often memory ran out: lower "
            f"data.num_workers (now {num_workers}) or data.decode_size, or enlarge /dev/shm (docker: "
            f"--shm-size); then run again to go on from the last checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _start(loader: DataLoader[Any]) -> Iterator[Decoded]:
    """Start the workers.

    torch installs a handler that raises a worker's death wherever the main thread is, which may be in the
    middle of saving a checkpoint. It is taken out again: the next batch tells, within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; these children only run PIL, and no torch thread pool.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        stream = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return stream


def _start_method() -> str:
    """Fork shares the list of files for nothing; where it is unsafe (macOS) or missing, spawn."""
    return "fork" if sys.platform == "linux" else "spawn"


def _init_worker(number: int) -> None:
    torch.set_num_threads(1)
    ignore_warnings()
    # Signals of the terminal or the cluster go to a process group: the main process alone decides what to do.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    gc.freeze()  # a collection would touch, and so copy, every page shared with the main process


def _as_is(batch: Any) -> Any:
    return batch


def num_bytes(images: Images) -> int:
    """Bytes of the decoded set."""
    return len(images) * 3 * images.size**2

"""Run one job at a time, inline or on a background thread, with the same results."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

Job = Callable[[], None]

# Seconds to wait for a running job when the run ends; the slowest is a search of millions of rows.
_PATIENCE_S = 30.0


class Inline:
    """Run each job at once."""

    def submit(self, job: Job) -> None:
        """Run ``job``."""
        job()

    def wait(self) -> None:
        """Do nothing: no job is ever running."""

    def close(self) -> None:
        """Do nothing: there is no thread to end."""


class Worker:
    """Run jobs on one daemon thread, one at a time: ``submit`` waits for the job before.

    The owner must not touch what a job uses between ``submit`` and ``wait``. On CUDA, jobs run on a stream
    of their own, after the work enqueued before ``submit``; a job has ended when the device has finished it,
    so that its tensors may be freed or read on any stream.
    The thread holds no reference to its owner, and ends with the owner or with the process. Both wait for the
    running job: a thread that is in native code when Python exits crashes the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Any] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._pending = False
        self._error: BaseException | None = None
        self._device = device
        # OpenMP's thread count is set per calling thread; equal counts give equal sums.
        arguments = (self._jobs, self._done, device, torch.get_num_threads())
        self._thread = threading.Thread(target=_run, args=arguments, name="look-ahead", daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, self._jobs, self._thread)

    def submit(self, job: Job) -> None:
        """Start ``job`` after the one before has ended.

        Raises:
            BaseException: raised by an earlier job, with its traceback.
            RuntimeError: the worker was closed.
        """
        self.wait()
        if not self._thread.is_alive():
            raise RuntimeError("the miner was closed; build a new one")
        self._pending = True
        self._jobs.put((job, _event(self._device)))

    def wait(self) -> None:
        """Wait until the job has ended.

        Raises:
            BaseException: raised by the job, with its traceback; again at every later call.
        """
        if self._pending:
            self._error = self._done.get()
            self._pending = False
        if self._error is not None:
            raise self._error

    def close(self, timeout_s: float = _PATIENCE_S) -> None:
        """Ask the thread to end; after ``timeout_s`` seconds a hanging job is abandoned."""
        _end(self._jobs, self._thread, timeout_s)


def _end(jobs: Any, thread: threading.Thread, timeout_s: float = _PATIENCE_S) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():  # its job may hold the last reference to the owner
        thread.join(timeout_s)


def _run(jobs: Any, done: Any, device: torch.device, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    while (item := jobs.get()) is not None:
        job, event = item
        error = None
        try:
            if stream is not None:
                stream.wait_event(event)
            with torch.no_grad(), torch.cuda.stream(stream):
                job()
            if stream is not None:
                stream.synchronize()
        except BaseException as caught:  # of any type: passed to the caller
            error = caught
        done.put(error)
        del job, item, error  # so that a waiting thread keeps nothing of its owner alive


def _event(device: torch.device) -> Any:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

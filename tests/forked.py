"""Run functions in processes of their own, forked from one that has imported the libraries."""

import multiprocessing
import time

import torch.multiprocessing as mp


def forkserver():
    """Return the context of such processes, which saves the seconds of the imports in each.

    What they run lives at module level. The checks of types, which ``torch.compile`` cannot trace, are not in
    place there.
    """
    mp.set_forkserver_preload(["torch.distributed", "contrastive.module", "eval.evaluate"])
    return multiprocessing.get_context("forkserver")


def run_forked(function, *arguments, processes=1, limit_s=90):
    """Call ``function(number, *arguments)`` in each process; raise where one fails, or takes too long."""
    method = forkserver().get_start_method()
    context = mp.start_processes(function, arguments, nprocs=processes, join=False, start_method=method)
    deadline = time.monotonic() + limit_s
    try:
        while not context.join(timeout=1):  # raises when a process fails
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__}: no end within {limit_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()

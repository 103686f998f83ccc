"""Run a function in several gloo processes; a time-out or a failure in any of them fails the test."""

import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, tmp_path, *arguments, world=2, limit_s=90):
    """``function(rank, *arguments)`` in ``world`` processes that share a process group.

    ``function`` lives at module level, since new processes import it; what it returns comes back by rank.
    """
    # One server imports these, every rank of every test is forked from it: seconds saved per process.
    mp.set_forkserver_preload(["torch.distributed", "contrastive.module", "eval.evaluate"])
    context = mp.start_processes(
        _enter,
        (function, world, str(tmp_path), arguments),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + limit_s
    try:
        while not context.join(timeout=1):  # raises when a process fails
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__}: the ranks did not finish in {limit_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _enter(rank, function, world, folder, arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # as in the tests' own process
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    # A rank that ends while another still connects would be reported in place of what went wrong.
    dist.barrier()
    result = function(rank, *arguments)
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()

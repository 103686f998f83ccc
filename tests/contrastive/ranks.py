"""Run a function in several gloo processes; a time-out or a failure in any of them fails the test."""

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.forked import run_forked


def run_ranks(function, tmp_path, *arguments, world=2, limit_s=90):
    """``function(rank, *arguments)`` in ``world`` processes that share a process group.

    ``function`` lives at module level, since new processes import it; what it returns comes back by rank.
    """
    run_forked(_enter, function, world, str(tmp_path), arguments, processes=world, limit_s=limit_s)
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

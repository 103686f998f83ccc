"""Join the processes of torchrun, which compute features together."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from contrastive.config import launcher_number


@contextmanager
def joined(device: torch.device) -> Iterator[bool]:
    """Join the processes that torchrun started until the context ends; yield whether there are several.

    Processes other than the first log only warnings.
    """
    if launcher_number("WORLD_SIZE", 1) == 1:
        yield False
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_first():
        logging.getLogger("eval").setLevel(logging.WARNING)
    try:
        yield True
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Return whether this is the process that scores, writes and prints."""
    return launcher_number("RANK", 0, least=0) == 0

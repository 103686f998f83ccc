"""End a run in which a rank hangs: the others would wait in a collective for half an hour."""

import logging
import os
import socket
import threading
import time
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning import Callback

from contrastive.config import first_line
from contrastive.distributed import num_entered, rank, world_size

logger = logging.getLogger(__name__)


class WatchRanks(Callback):
    """Ends a run of several ranks that makes no progress, and logs which rank is behind.

    Every rank counts its batches and the collectives it entered, which come in the same order on all ranks. A
    thread watches the count. If it stops growing, the ranks compare counts over the rendezvous store, which
    needs neither another rank's main thread nor a device. The others wait for the rank with the lowest count.

    Args:
        limit_s: Seconds without progress before the run ends with exit code 1; less than the process group's
            own timeout of 1,800, and more than saving or scoring takes on one rank.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._batches = 0
        self._over = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the watching thread, if there are several ranks."""
        self._over.clear()
        if world_size() > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # a separate connection
            threading.Thread(target=self._watch, args=(store,), name="watch-ranks", daemon=True).start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch as progress."""
        self._batches += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the watching thread."""
        self._over.set()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop the watching thread."""
        self._over.set()

    def _watch(self, store: Any) -> None:
        seen, since, every_s = -1, time.monotonic(), min(5.0, self.limit_s / 10)
        grace_s = 2 * every_s + 6  # all ranks give up at about the same time, also on a busy machine
        while not self._over.wait(every_s):
            count = self._batches + num_entered()
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since > self.limit_s:
                logger.error("%s", f"no progress for {self.limit_s:g} s: {_who(store, count, grace_s)}")
                if rank() == 0:
                    time.sleep(grace_s)  # it hosts the store, and others may read it a little later
                logging.shutdown()
                os._exit(1)  # the main thread waits inside a library, where no exception reaches it


def _who(store: Any, count: int, grace_s: float) -> str:
    """Describe which ranks are behind, after ``grace_s`` seconds in which all ranks publish their count."""
    try:
        store.set(_key(rank()), f"{count} {socket.gethostname()} {os.getpid()}")
        time.sleep(grace_s)
        answers = [
            store.get(_key(r)).decode().split() if store.check([_key(r)]) else None
            for r in range(world_size())
        ]
    except RuntimeError as error:  # DistError, DistNetworkError: rank 0, which hosts the store, is gone
        return f"rank 0 does not answer ({first_line(error)})"
    most = max(int(words[0]) for words in answers if words)
    behind = []
    for r, words in enumerate(answers):
        if words is None:
            behind.append(f"rank {r} gives no sign of life")
        elif int(words[0]) < most:
            behind.append(f"rank {r} on {words[1]}, process {words[2]}, hangs; the others wait for it")
    return "; ".join(behind) or "all ranks wait in the same place, so the network or a device hangs"


def _key(number: int) -> str:
    return f"watch-ranks/{number}"

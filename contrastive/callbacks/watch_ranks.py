"""A rank that hangs: the others would wait in a collective, for half an hour, and not know for whom."""

import logging
import os
import socket
import threading
import time
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning import Callback

from contrastive.distributed import num_entered, rank, world_size

logger = logging.getLogger(__name__)


class WatchRanks(Callback):
    """Ends a run of several ranks that stands still, and names the rank that is behind.

    Every rank counts the batches and the collectives it entered, which all do in the same order. A thread
    watches the count; when it stands still, the ranks compare theirs over the store they met by, which
    needs no other rank's main thread, nor its device. Whoever entered less is who the others wait for.

    Args:
        limit_s: Seconds without progress before the run ends with exit code 1; less than the 1,800 after
            which the process group gives up by itself, and more than saving or scoring takes on one rank.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._batches = 0
        self._over = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch from now on, where there is anyone to wait for."""
        self._over.clear()
        if world_size() > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
            threading.Thread(target=self._watch, args=(store,), name="watch-ranks", daemon=True).start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Progress: the batch is there."""
        self._batches += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no more."""
        self._over.set()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watch no more."""
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
                    time.sleep(grace_s)  # it keeps the store, and others may ask a little later
                logging.shutdown()
                os._exit(1)  # the main thread waits inside a library, where no exception reaches it


def _who(store: Any, count: int, grace_s: float) -> str:
    """Which ranks are behind, in words; all have ``grace_s`` seconds to say where they stand."""
    try:
        store.set(_key(rank()), f"{count} {socket.gethostname()} {os.getpid()}")
        time.sleep(grace_s)
        told = [
            store.get(_key(r)).decode().split() if store.check([_key(r)]) else None
            for r in range(world_size())
        ]
    except RuntimeError as error:  # DistError, DistNetworkError: whoever keeps the store is gone
        return f"rank 0 does not answer ({str(error).splitlines()[0]})"
    most = max(int(words[0]) for words in told if words)
    behind = []
    for r, words in enumerate(told):
        if words is None:
            behind.append(f"rank {r} gives no sign of life")
        elif int(words[0]) < most:
            behind.append(f"rank {r} on {words[1]}, process {words[2]}, hangs; the others wait for it")
    return "; ".join(behind) or "all ranks wait in the same place, so the network or a device hangs"


def _key(number: int) -> str:
    return f"watch-ranks/{number}"

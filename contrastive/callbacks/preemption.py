"""Save a checkpoint and stop training on a signal or at the time limit."""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.distributed import note_entry
from contrastive.signals import SIGNALS, hand_back, take_over


def is_preempted(trainer: Trainer) -> bool:
    """Return whether a signal or the time limit stopped training, so that optional work should be skipped."""
    return any(isinstance(each, Preemption) and each.stopped_by for each in trainer.callbacks)  # type: ignore[attr-defined]


MAX_TIME = "trainer.max_time"
_REASONS = (MAX_TIME, *SIGNALS)


class Preemption(Checkpoint):
    """Saves and stops at the end of the optimizer step in which any rank gets SIGTERM, SIGUSR1 or SIGINT.

    A time limit stops it in the same way, after at least one step, so that every start makes progress.

    A handler only sets a flag: saving inside one can hang in a collective. While training, the handlers
    replace Lightning's: its SIGTERM handler broadcasts, and its SLURM requeue saves inside the handler. Pass
    ``SLURMEnvironment(auto_requeue=False)`` to the trainer, so that this cannot happen before training starts
    either. If training does not run in the main thread, handlers are not changed.

    Args:
        save: Callback that saves the checkpoint.
        most_s: Seconds from now until training stops; None is no limit. A resumed run counts anew.

    Attributes:
        stopped_by: ``"SIGTERM"``, ``"SIGUSR1"``, ``"SIGINT"`` or ``"trainer.max_time"`` once it stopped
            training, on whichever rank it arrived, else None. The command line then exits with 75.
    """

    def __init__(self, save: SaveCheckpoint, most_s: float | None = None) -> None:
        self._deadline = None if most_s is None else time.monotonic() + most_s
        self.stopped_by: str | None = None
        self._save = save
        self._step = 0
        self._received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers; Lightning has installed its own just before."""
        self.stopped_by, self._received, self._step = None, None, trainer.global_step
        self._previous = take_over(self._flag)
        if trainer.received_sigterm:  # it arrived just before: Lightning would exit without saving
            self._received = "SIGTERM"
            trainer._signal_connector.received_sigterm = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # gloo communicates between hosts: reading a result from the device would wait for the whole step.
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, save and stop if any rank is flagged."""
        if trainer.global_step == self._step:
            return  # gradients accumulate: the step is not complete
        self._step = trainer.global_step
        if self._received is None and self._is_late(trainer):
            self._received = MAX_TIME
        self.stopped_by = self._on_any_rank()
        if self.stopped_by is not None:
            self._save.save(trainer)
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = None  # either would make Lightning continue anyway
            trainer.fit_loop.epoch_loop.min_steps = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def _flag(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT] or signal.default_int_handler)

    def _is_late(self, trainer: Trainer) -> bool:
        """Return whether the time limit is reached; at the last step the run ends anyway."""
        if self._deadline is None or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            return False
        return time.monotonic() >= self._deadline

    def _on_any_rank(self) -> str | None:
        """Return the reason for which any rank stops; of several, the last one in _REASONS."""
        if self._group is None:
            return self._received
        index = -1 if self._received is None else _REASONS.index(self._received)
        flag = torch.tensor([index], dtype=torch.int32)
        note_entry()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return None if flag.item() < 0 else _REASONS[int(flag.item())]

    def _restore(self) -> None:
        hand_back(self._previous)
        self._previous = {}

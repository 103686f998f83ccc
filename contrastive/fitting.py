"""Run Trainer.fit, and turn each way it can end into an exit code and a message."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl

from contrastive.callbacks.preemption import Preemption
from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.checkpoint.folder import delete_after
from contrastive.config import UserError, first_line
from contrastive.data.decode import SourceLost
from contrastive.data.tally import TooManyCorrupt
from contrastive.fit_checks import is_out_of_memory
from contrastive.logging.wandb_logger import alert
from contrastive.module import ContrastiveModule
from contrastive.step_guard import Diverged

logger = logging.getLogger(__name__)

_ALERTS: dict[type[Exception], str] = {
    Diverged: "divergence",
    TooManyCorrupt: "unreadable files",
    SourceLost: "data out of reach",
}


def fit(
    trainer: pl.Trainer,
    module: ContrastiveModule,
    checkpoint: Path | None,
    saving: SaveCheckpoint,
    preemption: Preemption,
) -> int:
    """Train; return the exit code.

    Raises:
        UserError: training does not fit into memory.
    """
    code = 0
    try:
        with explain_out_of_memory():
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except (Diverged, TooManyCorrupt, SourceLost) as error:
        text = f"stopped: {error}"
        if isinstance(error, Diverged) and trainer.is_global_zero:
            last_good = delete_after(saving.directory, after=error.since)
            text += f". {last_good} is the last good checkpoint" if last_good else ". No checkpoint was good"
        logger.error("%s", text)
        alert(trainer, _ALERTS[type(error)], text)
        code = 3
    finally:
        module.miner.close()
    if preemption.stopped_by is not None:
        text = f"stopped by {preemption.stopped_by} after saving; run the same command again to continue"
        logger.info("%s", text)
        alert(trainer, "preemption", text)
        code = 75
    return code


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that says which sizes to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise UserError(
            f"training does not fit into memory ({reason}); raise trainer.accumulate_grad_batches "
            "and run again to continue from the last checkpoint, or start a new run with a lower "
            "data.global_batch"
        ) from error


@contextmanager
def explain_full_disk(run_dir: Path) -> Iterator[None]:
    """Turn a failed write of the run's own files into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror or error}); free some space, then run "
            "the same command again to continue from the last checkpoint"
        ) from error

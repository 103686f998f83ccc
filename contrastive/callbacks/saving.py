"""Save checkpoints while training."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from contrastive.checkpoint.folder import read_last, remove_stale, set_last
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO, SaveOptions
from contrastive.logging.throughput import off_the_clock


class SaveCheckpoint(Checkpoint):
    """Saves ``directory/step-N`` while training, through the trainer's :class:`DirectoryCheckpointIO`.

    As a ``Checkpoint`` it runs after all other callbacks of a hook, but *before* the module's own
    ``on_train_batch_end``: what belongs into the checkpoint of a step (the bank's rows, the row of
    metrics.csv) must be written before, e.g. in ``optimizer_step`` or another callback. A failing disk is
    reported once and training continues. All ranks call the same saves; only rank 0 writes.

    Args:
        directory: The run's ``checkpoints`` folder.
        every_steps: Optimizer steps between saves; None saves at the end of each of Lightning's epochs, which
            in this project is the end of the plan. The end of training is always saved.
        keep_last: Number of checkpoints to keep, 1 or more.
        extra_files: Writes further files into the folder of a checkpoint, e.g. ``encoder.safetensors``.
        in_doubt: Returns whether the weights may have diverged; a save that is due is then postponed to the
            first step after which they have not, so that no bad checkpoint replaces a good one.

    Attributes:
        step: Optimizer step of the newest save, 0 before the first; survives a resume.
    """

    def __init__(
        self,
        directory: Path,
        every_steps: int | None = None,
        keep_last: int = 2,
        extra_files: Callable[[Trainer, Path], None] | None = None,
        in_doubt: Callable[[Trainer], bool] = lambda trainer: False,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: allowed is 1 or more")
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.step = 0
        self._in_doubt, self._postponed = in_doubt, False
        self._warned = False
        self._extra_files, self._keep_last = extra_files, keep_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer with another CheckpointIO; remove the partial files of killed saves."""
        if not isinstance(trainer.strategy.checkpoint_io, DirectoryCheckpointIO):
            raise ValueError("SaveCheckpoint needs Trainer(plugins=[DirectoryCheckpointIO()])")
        if trainer.is_global_zero:
            remove_stale(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Point ``last`` at the checkpoint resumed from: a kill may come between a save and that update."""
        resumed = self.directory / f"step-{self.step}"
        if trainer.is_global_zero and resumed.is_dir() and read_last(self.directory) != resumed:
            set_last(resumed)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is already saved; call it on all ranks, between optimizer steps."""
        if trainer.global_step == self.step:
            return
        # Set first, as it is part of the checkpoint, and not reset if the save fails: other ranks do not
        # learn of a failure, and if rank 0 alone tried the same step again, it would wait for them forever.
        self.step = trainer.global_step
        with off_the_clock(trainer, "checkpoint", self.every_steps):
            write_files = None if self._extra_files is None else partial(self._extra_files, trainer)
            options = SaveOptions(write_files, self._keep_last, self._report)
            trainer.save_checkpoint(self.directory / f"step-{self.step}", storage_options=options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every ``every_steps`` optimizer steps, or after the last batch of an epoch."""
        # Not in on_train_epoch_end: Lightning does not give a loader its state back when resumed from there.
        # While gradients accumulate, global_step does not change, and save() does not save a step twice.
        due = (
            trainer.is_last_batch if self.every_steps is None else trainer.global_step % self.every_steps == 0
        )
        wanted = due or self._postponed
        self._postponed = wanted and self._in_doubt(trainer)
        if wanted and not self._postponed:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the newest save."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the newest save, so that it is not saved again."""
        self.step = int(state_dict["step"])

    def _report(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.directory}/step-{self.step}: saving failed ({error.strerror or error}); training "
                "continues, older checkpoints stay. Free some space: later saves try again without a warning",
                stacklevel=2,
            )

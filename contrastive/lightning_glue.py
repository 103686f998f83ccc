"""Adapt PyTorch Lightning to this project; all workarounds are here.

Lightning runs the devices, the precision, DDP and accumulation. It differs from this project in three points:

- it counts epochs and restarts its loader in each: here the whole plan is one pass (``continue_after``,
  ``StepCallback``), whose length may change (``end_after``);
- ``self.log`` counts from 0 and reaches the loggers only after the callbacks that save, so a kill would lose
  a row (``log_row``);
- it prints to stdout, which is for results (``progress_bar``).
"""

import contextlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor
from torch.amp import GradScaler


def ignore_untrue_warnings() -> None:
    """Ignore warnings of libraries that a user of this project cannot act on."""
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    # Untrue here: the last step has a row whatever the interval.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")


def continue_after(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Set the saved state of Lightning's loops to just after the checkpoint's optimizer step.

    Only the step decides where a run continues. The saved loops also depend on why the run stopped (one cut
    short by ``max_steps`` looks finished) and on the micro-batches of a step, which may have changed.

    Callbacks save before Lightning counts the batch in progress as completed, and on restart Lightning adds 1
    for it. So this state is of the same moment: the epoch is started and not completed, and ``completed`` and
    ``_batches_that_stepped`` are one less than what was done.

    Args:
        checkpoint: The dict that Lightning loaded; changed in place.
        accumulate: Micro-batches of an optimizer step in this start of the run.
    """
    step = checkpoint["global_step"]
    batches, loop = step * accumulate, checkpoint["loops"]["fit_loop"]
    # Epoch 1 of 1 is in progress; so is its last batch, all but "completed".
    begun = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    delivered = {"ready": batches, "completed": batches - 1, "started": batches, "processed": batches}
    loop["epoch_progress"] = {"total": dict(begun), "current": dict(begun)}
    loop["epoch_loop.batch_progress"] |= {"total": dict(delivered), "current": dict(delivered)}
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    for loader in loop["state_dict"]["combined_loader"]:
        loader["delivered"] = batches


def end_after(trainer: Trainer, steps: int | None) -> None:
    """Tell Lightning's loops, which read the loader's length once, after how many optimizer steps to end.

    Call it between steps, once training has started; None if it is not known yet.
    """
    loop = trainer.fit_loop
    loop.max_batches = math.inf if steps is None else steps * trainer.accumulate_grad_batches
    if steps is not None:
        assert loop._data_fetcher is not None
        loop._data_fetcher.length = steps * trainer.accumulate_grad_batches


def loss_scaler(module: pl.LightningModule) -> GradScaler | None:
    """Return the loss scaler of ``trainer.precision=16-mixed``; None otherwise, and without a trainer."""
    trainer = module._trainer
    return None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)


def log_row(trainer: Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Send ``metrics`` to all loggers as (part of) the row of the optimizer steps taken so far.

    Scalar tensors of one device are fetched in one transfer; ``epoch`` may be among them. Only
    rank 0 logs.
    """
    if not trainer.loggers or not trainer.is_global_zero:
        return
    values = _floats(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_interval(trainer: Trainer) -> int:
    """Return the optimizer steps between two rows, ``Trainer(log_every_n_steps=...)``; 0 logs nothing."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
    return every


def is_logged(trainer: Trainer) -> bool:
    """Return whether the optimizer step just done is logged: one per interval, and the run's last."""
    every, step = log_interval(trainer), trainer.global_step
    return every > 0 and (step % every == 0 or step == trainer.max_steps or trainer.is_last_batch)


def _floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    values = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        values |= dict(
            zip(names, torch.stack([tensors[name].to(wide) for name in names]).tolist(), strict=True)
        )
    return {name: float(values[name]) for name in metrics}


class StepCallback(Callback):
    """Calls :meth:`on_step` and :meth:`on_epoch` after the batch that completes an optimizer step."""

    _seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the step that a resumed run starts from."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the hooks if the batch completed an optimizer step."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        self.on_step(trainer, pl_module, step)
        plan: Any = pl_module.plan
        epochs, rest = divmod(step, plan.steps_per_epoch)
        if rest == 0:
            self.on_epoch(trainer, pl_module, epochs)

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Handle the end of an optimizer step; ``step`` of them are done."""

    def on_epoch(self, trainer: pl.Trainer, module: Any, epochs: int) -> None:
        """Handle the end of an epoch; ``epochs`` of them are done."""


class _StderrBar(TQDMProgressBar):
    """Lightning's tqdm bar on stderr: stdout is for results. Its total is the run's length of now."""

    # Lightning passes file=sys.stdout, and a bar draws itself on construction: changing it later is too late.

    def init_sanity_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_sanity_tqdm()

    def init_train_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def on_train_batch_end(self, *args: Any) -> None:
        total = self.total_train_batches
        self.train_progress_bar.total = total if math.isfinite(total) else None
        super().on_train_batch_end(*args)


class _RichBar(RichProgressBar):
    """Lightning's rich bar, without the epoch: for Lightning the whole run is one.

    Its total is the run's length of now; it appears once that is known, since one without an end would never
    show the time that is left.
    """

    def on_train_epoch_start(self, *args: Any) -> None:
        if math.isfinite(self.total_train_batches):
            super().on_train_epoch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        if math.isfinite(self.total_train_batches):
            super().on_train_batch_end(*args)
            if self.progress is not None and self.train_progress_bar_id is not None:
                self.progress.update(self.train_progress_bar_id, total=self.total_train_batches)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Pretraining"


def progress_bar(enabled: bool) -> Callback | None:
    """Build a progress bar on stderr, by rich if it is installed, else by tqdm; None if not ``enabled``."""
    if not enabled:
        return None
    if importlib.util.find_spec("rich") is None:
        return _StderrBar()
    return _RichBar(console_kwargs={"stderr": True})

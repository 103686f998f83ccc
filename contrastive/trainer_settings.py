"""Check the user's settings of Lightning's Trainer, and build the Trainer."""

import inspect
import logging
import math
import os
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.callbacks import Checkpoint, ProgressBar, Timer

from contrastive.callbacks.profile import ProfileSteps
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import nearest
from contrastive.run_dir import is_first_rank

logger = logging.getLogger(__name__)

# At INFO, Lightning advertises and repeats our own log lines. Its warnings stay.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

RESERVED = {
    "logger": "logging.*",
    "callbacks": "the Python API",
    "plugins": "the Python API",
    "max_epochs": "schedule.epochs",
    "min_epochs": "schedule.epochs",
    "log_every_n_steps": "logging.every_n_steps",
    "enable_checkpointing": "run.checkpoint_every",
    "enable_progress_bar": "logging.progress",
    "default_root_dir": "run.root",
    "fast_dev_run": "--dry-run",
    "sync_batchnorm": "encoder.batch_norm=sync",
    "use_distributed_sampler": "nothing: the plan deals out the rows",
    "reload_dataloaders_every_n_epochs": "nothing: the plan deals out the rows",
    "limit_train_batches": "trainer.max_steps",
    "overfit_batches": "trainer.max_steps",
}
"""Trainer settings that the run sets itself, and what to use instead."""


ALLOWED: dict[str, tuple[Any, ...]] = {
    # The networks' precision; views, similarities and the loss are float32 in all cases.
    "precision": ("32-true", "32", "bf16-mixed", "16-mixed", 32),
    # One process per device, started from the command line; bank and checkpoints support no other way.
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"),
    "deterministic": (False, True, "warn", None),
    "detect_anomaly": (False, True),
    "gradient_clip_algorithm": ("norm", "value", None),
}
"""Allowed values of Trainer settings that Lightning does not validate: it fails late or ignores them."""


def check_trainer(given: dict[str, Any], profile: bool) -> None:
    """Refuse invalid settings of ``trainer`` that Lightning would report late, or never.

    Raises:
        UserError: names the setting, what is allowed, and what to do.
    """
    allowed = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"} - set(RESERVED)
    for key in given:
        if key in RESERVED:
            raise UserError(f"trainer.{key} is set by the run itself; use {RESERVED[key]}")
        if key not in allowed:
            raise UserError(f"unknown key 'trainer.{key}'; {nearest(key, sorted(allowed))}")
    if profile and "profiler" in given:
        raise UserError("profile=true is a profiler of its own: drop it or trainer.profiler")
    for key in ("max_steps", "min_steps", "accumulate_grad_batches", "num_nodes"):
        if key in given and not (type(given[key]) is int and given[key] >= 1):
            raise UserError(f"trainer.{key}={given[key]!r}: a whole number, 1 or more, is needed")
    clip = given.get("gradient_clip_val")
    if clip is not None and not (type(clip) in (int, float) and 0 <= clip < math.inf):
        raise UserError(
            f"trainer.gradient_clip_val={clip!r}: a number, 0 or more, is needed; 0 clips nothing"
        )
    for key, allowed_values in ALLOWED.items():
        if key in given and given[key] not in allowed_values:
            raise UserError(f"trainer.{key}={given[key]}: allowed are {', '.join(map(str, allowed_values))}")
    time_limit(given)
    _check_launcher(given.get("num_nodes", 1))


def time_limit(given: dict[str, Any]) -> float | None:
    """Return ``trainer.max_time`` in seconds, for one start; Lightning would count it over all resumes.

    Raises:
        UserError: not a valid time.
    """
    try:
        return Timer(given.get("max_time")).time_remaining()
    except Exception as error:
        raise UserError(
            f"trainer.max_time={given['max_time']!r}: DD:HH:MM:SS is needed, e.g. 00:12:00:00 for 12 hours"
        ) from error


def _check_launcher(num_nodes: int) -> None:
    """Refuse several nodes without a launcher: a process would wait for the others forever."""
    launched = SLURMEnvironment.detect() or TorchElasticEnvironment.detect() or "NODE_RANK" in os.environ
    if num_nodes > 1 and not launched:
        raise UserError(
            f"trainer.num_nodes={num_nodes}: nothing says which node this is; start it on each by SLURM "
            "(scripts/slurm.sbatch), by torchrun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT set"
        )


def build_trainer(
    config: PretrainConfig, callbacks: list[pl.Callback], keep_precision: bool, **more: Any
) -> pl.Trainer:
    """Build Lightning's Trainer from the config's settings and ours.

    Args:
        config: The run.
        callbacks: Callbacks, in the order of their calls.
        keep_precision: Train in ``trainer.precision`` also on a CPU that only emulates bfloat16, where
            float32 is used otherwise.
        more: Further settings, which override the config's.

    Raises:
        UserError: Lightning refuses the settings.
    """
    trainer = _make_trainer(config, callbacks, **more)
    mixed = str(trainer.precision).endswith("mixed")
    if not mixed or trainer.strategy.root_device.type != "cpu" or cpu_takes_bf16():
        return trainer
    given = config.trainer["precision"]
    fallback = f"32-true is used; trainer.precision={given} on the command line keeps it"
    if is_first_rank():
        logger.warning(
            "trainer.precision=%s takes several times as long as 32-true on this processor, which has "
            "neither bfloat16 instructions nor AVX-512; %s",
            given,
            "set trainer.precision=32-true" if keep_precision else fallback,
        )
    return trainer if keep_precision else _make_trainer(config, callbacks, **more, precision="32-true")


def cpu_takes_bf16() -> bool:
    """Return whether oneDNN computes in bfloat16 here: with its instructions, or with those of AVX-512.

    Elsewhere a step takes several times as long as in float32. With AVX-512 alone it takes up to 1.6 times as
    long, so ``choosing.machine`` chooses bfloat16 only where there are instructions for it.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _make_trainer(config: PretrainConfig, callbacks: list[pl.Callback], **more: Any) -> pl.Trainer:
    plugins: list[Any] = [DirectoryCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing saves inside the signal handler, which can hang; we save between steps.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    settings = {"enable_model_summary": False, **config.trainer, **more}
    settings.pop("max_time", None)  # ours, see time_limit
    for callback in callbacks:
        if isinstance(callback, ProfileSteps):
            settings["profiler"] = callback.watch
    try:
        return pl.Trainer(
            **settings,
            max_epochs=1,  # for Lightning, the whole plan is one epoch, so a resume is always within it
            plugins=plugins,
            callbacks=callbacks,
            logger=False,
            log_every_n_steps=config.logging.every_n_steps,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            use_distributed_sampler=False,
        )
    except Exception as error:  # it raises a dozen types, all because of the user's settings
        raise UserError(f"trainer: {error}; settings given: {config.trainer}") from error

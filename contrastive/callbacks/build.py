"""Build the callbacks of a run."""

import sys
from pathlib import Path
from typing import cast

import pytorch_lightning as pl

from contrastive.callbacks.attention import AttentionPictures
from contrastive.callbacks.gallery import Gallery
from contrastive.callbacks.metrics import LogMetrics
from contrastive.callbacks.online import OnlineScores
from contrastive.callbacks.profile import ProfileSteps
from contrastive.callbacks.progress import LogProgress
from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.callbacks.watch_health import WatchHealth
from contrastive.callbacks.watch_learning import WatchLearning
from contrastive.callbacks.watch_mining import WatchMining
from contrastive.callbacks.watch_ranks import WatchRanks
from contrastive.config import PretrainConfig
from contrastive.data.dataset import Dataset
from contrastive.data.plan import Plan
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import save_encoder
from contrastive.lightning_glue import progress_bar
from contrastive.logging.throughput import Throughput
from contrastive.module import ContrastiveModule
from contrastive.run_dir import UnreadableFiles


def build_saving(config: PretrainConfig, plan: Plan, run_dir: Path) -> SaveCheckpoint:
    """Build the callback that saves checkpoints; each has an encoder.safetensors beside it."""

    def write_files(trainer: pl.Trainer, folder: Path) -> None:
        module = cast(ContrastiveModule, trainer.lightning_module)
        write_encoder(config, module, folder)

    return SaveCheckpoint(
        run_dir / "checkpoints",
        config.run.checkpoint_every or plan.steps_per_epoch,
        max(2, config.run.keep_last),
        extra_files=write_files,
        in_doubt=lambda trainer: cast(ContrastiveModule, trainer.lightning_module).guard.in_doubt,
    )


def build_monitors(
    config: PretrainConfig, dataset: Dataset, run_dir: Path, unreadable: UnreadableFiles
) -> list[pl.Callback]:
    """Build the callbacks that monitor, log and draw, in the order of their calls."""
    logging = config.logging
    health, online = WatchHealth(), None
    callbacks: list[pl.Callback] = [
        Throughput(),
        LogMetrics(unreadable, dataset.train.labels),
        health,
        WatchMining(),
        WatchRanks(config.run.hang_s),
    ]
    if config.profile:
        callbacks.append(ProfileSteps())
    scored = logging.knn_every_epochs or logging.probe_every_epochs
    if scored and dataset.labelled is not None:
        online = OnlineScores(
            dataset.labelled, logging.knn_every_epochs, logging.probe_every_epochs, logging.score_share
        )
        callbacks.append(online)
    callbacks.append(WatchLearning(health, online))
    if logging.mined_rows:
        callbacks.append(Gallery(dataset.train, run_dir, logging.mined_rows))
    if logging.attention_every_epochs:
        callbacks.append(AttentionPictures(dataset.train, logging.attention_every_epochs))
    if (bar := progress_bar(config.logging.progress)) is not None:
        callbacks.append(bar)
    if bar is None or sys.stderr is None or not sys.stderr.isatty():  # a file gets the last bar alone
        callbacks.append(LogProgress())
    return callbacks


def write_encoder(config: PretrainConfig, module: ContrastiveModule, folder: Path) -> None:
    """Write ``encoder.safetensors``, the result of the run."""
    save_encoder(folder / "encoder.safetensors", module.encoder, InputSpec.of(config.data), {})

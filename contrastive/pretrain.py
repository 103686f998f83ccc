"""Composition root: build every part of a run from its config, check all of it, then write and train."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger

from contrastive.callbacks.build import build_monitors, build_saving
from contrastive.callbacks.preemption import Preemption
from contrastive.callbacks.time_budget import TimeBudget
from contrastive.checkpoint.folder import step_of
from contrastive.config import PretrainConfig, UserError
from contrastive.data.dataset import GIVEN, Dataset, as_dataset, open_dataset
from contrastive.data.decode import SourceLost
from contrastive.data.loader import choose_crop
from contrastive.data.order.build import build_order
from contrastive.data.plan import Plan
from contrastive.data.tally import TooManyCorrupt
from contrastive.distributed import wait_for_all
from contrastive.dry_run import SECONDS, STEPS, StepTimer, estimate, state_needs
from contrastive.encoders.encoder import Encoder
from contrastive.fit_checks import check_readable, warn_if_dark
from contrastive.fitting import explain_full_disk, explain_out_of_memory, fit
from contrastive.lightning_glue import ignore_untrue_warnings
from contrastive.logging.metrics_csv import MetricsCsv
from contrastive.logging.wandb_logger import build_wandb
from contrastive.methods.method import BuildMethod
from contrastive.parts import Given, build_module, choose_bank
from contrastive.run_dir import (
    UnreadableFiles,
    begun_config,
    check_writable,
    find_start_point,
    is_first_rank,
    lock_run_dir,
    write_run_files,
)
from contrastive.slurm import requeue
from contrastive.step_guard import Diverged
from contrastive.summary import finish, last_step
from contrastive.trainer_settings import build_trainer, check_trainer, time_limit
from memory_bank.miner import Miner, build_miner

logger = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    dry_run: bool = False,
    keep_precision: bool = False,
    images: Any = None,
    encoder: Encoder | None = None,
    method: BuildMethod | None = None,
    miner: Callable[..., Miner] = build_miner,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[int, dict[str, Any] | None]:
    """Train as ``config`` says; return the exit code and the summary (None off rank 0).

    Everything the user can get wrong is checked before the first byte is written.

    Args:
        config: The run.
        dry_run: Take a few steps in a temporary folder, and keep nothing.
        keep_precision: See ``build_trainer``.
        images: Your own data set, instead of ``config.data.name``: a map-style torch Dataset of PIL images
            or uint8 (3, h, w) tensors; an ``Images``, e.g. ``DatasetImages(dataset, size, labels=...)``,
            whose labels monitors read; or a ``Dataset``. config.yaml then says ``data.name: dataset``.
        encoder: Your own network, instead of ``config.encoder.name``; it is trained in place. To read the
            encoder file later, pass a network of the same class to ``load_encoder``.
        method: Your own ``Method`` (its class, or a function from ``Parts``), instead of ``config.method``.
        miner: Function that builds the miner, with the arguments of ``build_miner``.
        callbacks: Your own callbacks, called after those of the run.

    Raises:
        UserError: wrong input; exit code 2.
    """
    ignore_untrue_warnings()
    given = Given(images, encoder, method, miner, callbacks)
    if images is not None:
        config = replace(config, data=replace(config.data, name=GIVEN, root=None))
    if dry_run:
        return _dry_run(config, given, keep_precision)
    minutes, run_dir = config.schedule.minutes, Path(config.run.root) / config.run.name
    budget = (
        [] if minutes is None else [TimeBudget(minutes, config.augment.first_cost(config.data.image_size))]
    )  # first of all, as its time begins here
    config, dataset, plan = _open(config, given)
    train_images = dataset.train
    end = last_step(config, plan)
    finished, checkpoint = find_start_point(run_dir, config, train_images, end, given.names())
    if finished is not None:
        logger.info("%s: this run is finished; choose another run.name to train again", run_dir)
        return 0, finished if is_first_rank() else None
    if checkpoint is not None and step_of(checkpoint) > plan.total_steps:
        raise UserError(
            f"{run_dir}: its checkpoint is of step {step_of(checkpoint)}, and {len(train_images)} "
            f"{train_images.noun} make a run of {plan.total_steps} steps; restore the data, or choose "
            "another run.name"
        )
    if checkpoint is not None:
        of = f" of {plan.total_steps}" if plan.has_end else ""
        logger.info("%s: continuing from step %d%s", run_dir, step_of(checkpoint), of)
    saving = build_saving(config, plan, run_dir)
    preemption = Preemption(saving, time_limit(config.trainer))
    unreadable = UnreadableFiles(run_dir / "corrupt.csv")
    monitors = build_monitors(config, dataset, run_dir, unreadable)
    trainer = build_trainer(config, [*budget, *monitors, saving, preemption, *callbacks], keep_precision)
    resumed = checkpoint is not None
    module = build_module(config, given, plan, train_images, trainer, unreadable, resumed=resumed)
    if not is_first_rank():
        code = fit(trainer, module, checkpoint, saving, preemption)
        wait_for_all()
        return code, None
    with lock_run_dir(run_dir):
        with explain_full_disk(run_dir):
            write_run_files(run_dir, config, train_images, given.names())
        table = MetricsCsv(run_dir)
        trainer.loggers = [table, *_build_wandb(config, run_dir)]
        code = fit(trainer, module, checkpoint, saving, preemption)
        with explain_full_disk(run_dir):
            summary = finish(config, module, trainer, run_dir, table.seconds, code)
        if preemption.stopped_by == "SIGUSR1" and config.run.requeue:
            requeue()
        wait_for_all()
        return code, summary


def _open(config: PretrainConfig, given: Given) -> tuple[PretrainConfig, Dataset, Plan]:
    """Open the data; return the config with ``data.crop`` and ``bank.kind`` that suit it, too."""
    check_trainer(config.trainer, config.profile)
    data = config.data
    dataset = open_dataset(data) if given.images is None else as_dataset(given.images, data)
    check_readable(dataset.train)
    if "data.white" not in config.chosen:  # else the white is that of these images
        warn_if_dark(dataset.train)
    if dataset.train.are_videos and data.frames == 1:
        logger.info(
            "data.frames=1: each view is one frame of a video, for an encoder of images; for one of clips "
            "set e.g. data.frames=8"
        )
    run_dir = Path(config.run.root) / config.run.name
    begun = begun_config(run_dir)  # a run that is continued keeps its crop and its bank
    if data.crop == "auto":
        crop = "auto" if begun is None else begun.data.crop
        if crop == "original" and (data.cache is not None or data.resident == "true"):
            raise UserError(
                f"{run_dir}: cuts its views from whole pictures (data.crop=original), whose squares are not "
                "kept; leave out data.cache and data.resident=true"
            )
        data = replace(data, crop=crop)
    config = replace(config, data=replace(data, crop=choose_crop(dataset.train, data)))
    order = build_order(config, dataset.train)
    epochs = config.schedule.epochs if config.schedule.minutes is None else None
    plan = Plan(len(dataset.train), config.run.seed, data.global_batch, epochs, order)
    return replace(config, bank=choose_bank(config, given, plan, begun)), dataset, plan


def _build_wandb(config: PretrainConfig, run_dir: Path) -> list[Logger]:
    if config.logging.wandb.mode == "disabled":
        return []
    saved = OmegaConf.load(run_dir / "config.yaml")
    wandb = build_wandb(
        config.logging.wandb,
        run_dir,
        config.run.name,
        OmegaConf.select(saved, "provenance.wandb_id"),
        cast(dict[str, Any], OmegaConf.to_container(saved)),
    )
    return [wandb] if wandb is not None else []


def _dry_run(config: PretrainConfig, given: Given, keep_precision: bool) -> tuple[int, dict[str, Any] | None]:
    """Take a few steps in a temporary folder; return the exit code and the estimate."""
    check_writable(Path(config.run.root) / config.run.name)
    with tempfile.TemporaryDirectory(prefix="contrastive-dry-run-") as scratch:
        config, dataset, plan = _open(config, given)
        timer = StepTimer(SECONDS)
        steps = min(STEPS, plan.total_steps)
        trainer = build_trainer(config, [timer], keep_precision, max_steps=steps)
        module = build_module(
            config, given, plan, dataset.train, trainer, UnreadableFiles(Path(scratch) / "corrupt.csv")
        )
        needed = state_needs(module, trainer.world_size) if trainer.is_global_zero else {}
        try:
            with explain_out_of_memory():
                trainer.fit(module)
        except (Diverged, TooManyCorrupt, SourceLost) as error:
            logger.error("stopped: %s", error)
            return 3, None
        finally:
            module.miner.close()
        return 0, estimate(timer, module) | needed if trainer.is_global_zero else None

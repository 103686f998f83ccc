"""Composition root: builds every part of a run from its config, checks all of it, then writes and trains."""

import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger

from contrastive.callbacks.gallery import Gallery
from contrastive.callbacks.metrics import LogMetrics
from contrastive.callbacks.online import OnlineScores
from contrastive.callbacks.preemption import Preemption
from contrastive.callbacks.profile import ProfileSteps
from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.callbacks.watch_health import WatchHealth
from contrastive.callbacks.watch_mining import WatchMining
from contrastive.callbacks.watch_ranks import WatchRanks
from contrastive.checkpoint.folder import forget, read_last, step_of
from contrastive.config import PretrainConfig, UserError
from contrastive.data.images import Images
from contrastive.data.loader import build_loader
from contrastive.data.plan import Plan
from contrastive.data.sources import open_labelled_train, open_train
from contrastive.data.tally import TooManyCorrupt
from contrastive.distributed import Collectives, wait_for_all
from contrastive.dry_run import SECONDS, STEPS, StepTimer, estimate
from contrastive.encoders.build import build_encoder
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import load_weights, save_encoder
from contrastive.fit_checks import check_fit, check_readable
from contrastive.lightning_glue import progress_bar
from contrastive.logging.memory import peak_memory
from contrastive.logging.metrics_csv import MetricsCsv, read_metrics
from contrastive.logging.throughput import Throughput
from contrastive.logging.wandb_logger import alert, build_wandb, finish_wandb
from contrastive.methods.build import find_method
from contrastive.methods.method import BuildMethod, Parts
from contrastive.module import ContrastiveModule
from contrastive.networks import Networks
from contrastive.run_dir import (
    UnreadableFiles,
    check_writable,
    hold,
    is_first_rank,
    look_at,
    prepare,
    write_atomically,
)
from contrastive.short_run import too_short_for
from contrastive.slurm import requeue
from contrastive.step_guard import Diverged
from contrastive.trainer_settings import build_trainer, check_trainer, time_limit
from memory_bank.miner import Miner, build_miner
from memory_bank.policy import overruled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """Parts that a program hands to ``pretrain`` in place of those the config names; see there."""

    images: Images | None = None
    encoder: Encoder | None = None
    method: BuildMethod | None = None
    miner: Callable[..., Miner] = build_miner
    callbacks: Sequence[pl.Callback] = field(default=())


def pretrain(
    config: PretrainConfig,
    *,
    dry_run: bool = False,
    keep_precision: bool = False,
    images: Images | None = None,
    encoder: Encoder | None = None,
    method: BuildMethod | None = None,
    miner: Callable[..., Miner] = build_miner,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[int, dict[str, Any] | None]:
    """Train as ``config`` says; return the exit code and the summary (None off rank 0).

    Everything the user can get wrong is checked before the first byte is written.

    Args:
        config: The run.
        dry_run: Take a few steps in a folder that is thrown away.
        keep_precision: See ``build_trainer``.
        images: Your own data set, in place of ``config.data.name``.
        encoder: Your own network, in place of ``config.encoder.name``. Whatever reads the encoder file later
            must be given a network of its class, see ``load_encoder``.
        method: Your own ``Method`` (its class, or a function from ``Parts``), in place of ``config.method``.
        miner: Builds the miner; takes what ``build_miner`` takes.
        callbacks: Your own, called after the run's.

    Raises:
        UserError: wrong input; exit code 2.
    """
    given = Given(images, encoder, method, miner, callbacks)
    if dry_run:
        return _dry_run(config, given, keep_precision)
    run_dir = Path(config.run.root) / config.run.name
    images, plan = _open(config, given)
    steps = min(config.trainer.get("max_steps", plan.total_steps), plan.total_steps)
    finished, checkpoint = look_at(run_dir, config, images, steps)
    if finished is not None:
        logger.info("%s: this run is finished; choose another run.name to train again", run_dir)
        return 0, finished if is_first_rank() else None
    if checkpoint is not None and step_of(checkpoint) > plan.total_steps:
        raise UserError(
            f"{run_dir}: stands at step {step_of(checkpoint)}, and {len(images)} images make a run of "
            f"{plan.total_steps} steps; restore the images, or choose another run.name"
        )
    saving = _build_saving(config, plan, run_dir)
    preemption = Preemption(saving, time_limit(config.trainer))
    unreadable = UnreadableFiles(run_dir / "corrupt.csv")
    monitors = _build_callbacks(config, images, run_dir, unreadable)
    trainer = build_trainer(config, [*monitors, saving, preemption, *callbacks], keep_precision)
    resumed = checkpoint is not None
    module = _build_module(config, given, plan, images, trainer, unreadable, resumed=resumed)
    if not is_first_rank():
        code = _fit(trainer, module, checkpoint, saving, preemption)
        wait_for_all()
        return code, None
    with hold(run_dir):
        with _room_for(run_dir):
            prepare(run_dir, config, images)
        table = MetricsCsv(run_dir)
        trainer.loggers = [table, *_build_wandb(config, run_dir)]
        code = _fit(trainer, module, checkpoint, saving, preemption)
        with _room_for(run_dir):
            summary = _finish(config, module, trainer, run_dir, table.seconds, code, steps)
        if preemption.stopped_by == "SIGUSR1" and config.run.requeue:
            requeue()
        wait_for_all()
        return code, summary


def _open(config: PretrainConfig, given: Given) -> tuple[Images, Plan]:
    check_trainer(config.trainer, config.profile)
    images = open_train(config.data) if given.images is None else given.images
    check_readable(images)
    return images, Plan(len(images), config.run.seed, config.data.global_batch, config.schedule.epochs)


def _build_module(
    config: PretrainConfig,
    given: Given,
    plan: Plan,
    images: Images,
    trainer: pl.Trainer,
    unreadable: UnreadableFiles,
    *,
    resumed: bool = False,
) -> ContrastiveModule:
    def note_corrupt(row: int, reason: str) -> None:
        unreadable.add(row, images.key(row), reason)

    def loader(trainer: pl.Trainer) -> Any:
        return build_loader(
            images,
            plan,
            config.data,
            device=trainer.strategy.root_device,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            whole_plan=True,
            on_corrupt=note_corrupt,
            progress=config.logging.progress,
        )

    check_fit(config, trainer)
    method = given.method or find_method(config)
    networks = _build_networks(config, given.encoder, resumed, getattr(method, "averages_keys", True))
    miner = _build_miner(config, given.miner, plan, trainer)
    _warn_of_settings(config, plan, miner, getattr(method, "mines", True))
    labels = images.labels if config.objective.name == "supcon" else None
    if config.objective.name == "supcon" and labels is None:
        raise UserError(
            f"objective.name=supcon: data.name={config.data.name} has no labels; use data.name=imagefolder "
            "with a folder for each class, or another objective"
        )
    parts = Parts(config, networks, miner, labels)
    return ContrastiveModule(config, plan, method(parts), loader, row_identity=images.numbering())


def _build_networks(
    config: PretrainConfig, encoder: Encoder | None, resumed: bool, averaged: bool
) -> Networks:
    torch.manual_seed(config.run.seed)
    try:
        if encoder is None:
            encoder = build_encoder(config.encoder, config.data.image_size)
        if config.encoder.weights is not None and not resumed:  # a checkpoint has every weight
            load_weights(encoder, config.encoder.weights)
        return Networks(encoder, config.encoder, seed=config.run.seed, averaged=averaged)
    except RuntimeError as error:  # torch's word for too little memory, and for sizes beyond counting
        raise UserError(
            f"encoder: the networks cannot be built ({str(error).splitlines()[0]}); lower encoder.width, or "
            "take another encoder.name, lower encoder.projector_hidden or encoder.predictor_hidden"
        ) from error


def _build_miner(
    config: PretrainConfig, build: Callable[..., Miner], plan: Plan, trainer: pl.Trainer
) -> Miner:
    try:
        return build(
            config.bank,
            config.mining,
            rows=plan.rows,
            dim=config.encoder.projector_dim,
            seed=config.run.seed,
            device=trainer.strategy.root_device,
            upcoming=lambda step: plan.ids(step) if step < plan.total_steps else None,
            exchange=Collectives(trainer.global_rank, trainer.world_size),
        )
    except (ValueError, RuntimeError, MemoryError) as error:
        remedy = "; lower bank.capacity or encoder.projector_dim" if _is_out_of_memory(error) else ""
        raise UserError(f"bank and mining: {error}{remedy}") from error


def _warn_of_settings(config: PretrainConfig, plan: Plan, miner: Miner, mines: bool) -> None:
    """Warn of settings that others overrule, or that the run is too short for."""
    slots = config.bank.capacity or plan.rows
    young = (config.bank.max_age or slots) * config.data.global_batch
    short = too_short_for(config, plan, mines=mines, approximate=miner.retrieval.approximate)
    for line in [*overruled(config.mining, min(slots, young)), *short] if is_first_rank() else ():
        logger.warning("%s", line)


def _build_saving(config: PretrainConfig, plan: Plan, run_dir: Path) -> SaveCheckpoint:
    def write_encoder(trainer: pl.Trainer, folder: Path) -> None:
        _save_encoder(config, cast(ContrastiveModule, trainer.lightning_module), folder)

    return SaveCheckpoint(
        run_dir / "checkpoints",
        config.run.checkpoint_every or plan.steps_per_epoch,
        max(2, config.run.keep_last),
        extra_files=write_encoder,
        in_doubt=lambda trainer: cast(ContrastiveModule, trainer.lightning_module).guard.in_doubt,
    )


def _build_callbacks(
    config: PretrainConfig, images: Images, run_dir: Path, unreadable: UnreadableFiles
) -> list[pl.Callback]:
    logging = config.logging
    callbacks: list[pl.Callback] = [
        Throughput(),
        LogMetrics(unreadable, images.labels),
        WatchHealth(),
        WatchMining(),
        WatchRanks(config.run.hang_s),
    ]
    if config.profile:
        callbacks.append(ProfileSteps())
    scored = logging.knn_every_epochs or logging.probe_every_epochs
    labelled = open_labelled_train(config.data) if scored else None
    if labelled is not None:
        callbacks.append(OnlineScores(labelled, logging.knn_every_epochs, logging.probe_every_epochs))
    if logging.mined_rows:
        callbacks.append(Gallery(images, run_dir, logging.mined_rows))
    if (bar := progress_bar(config.logging.progress)) is not None:
        callbacks.append(bar)
    return callbacks


def _build_wandb(config: PretrainConfig, run_dir: Path) -> list[Logger]:
    saved = OmegaConf.load(run_dir / "config.yaml")
    wandb = build_wandb(
        config.logging.wandb,
        run_dir,
        config.run.name,
        OmegaConf.select(saved, "provenance.wandb_id"),
        cast(dict[str, Any], OmegaConf.to_container(saved)),
    )
    return [wandb] if wandb is not None else []


def _fit(
    trainer: pl.Trainer,
    module: ContrastiveModule,
    checkpoint: Path | None,
    saving: SaveCheckpoint,
    preemption: Preemption,
) -> int:
    code = 0
    try:
        with _memory_for_steps():
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except (Diverged, TooManyCorrupt) as error:
        text = f"stopped: {error}"
        if isinstance(error, Diverged) and trainer.is_global_zero:
            last_good = forget(saving.directory, after=error.since)
            text += f". {last_good} is the last good checkpoint" if last_good else ". No checkpoint was good"
        logger.error("%s", text)
        alert(trainer, "divergence" if isinstance(error, Diverged) else "unreadable files", text)
        code = 3
    finally:
        module.miner.close()
    if preemption.stopped_by is not None:
        text = f"stopped by {preemption.stopped_by} after saving; the same command goes on from here"
        logger.info("%s", text)
        alert(trainer, "preemption", text)
        code = 75
    return code


@contextmanager
def _memory_for_steps() -> Iterator[None]:
    """Around the training: sizes that do not fit are for the user to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"training does not fit into memory ({reason}); raise trainer.accumulate_grad_batches, which "
            "goes on from the last checkpoint, or start a new run with a lower data.global_batch"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Devices have exceptions of their own for this, or none."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    )


@contextmanager
def _room_for(run_dir: Path) -> Iterator[None]:
    """Where the run's own files are written: a disk that is full is for the user to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror or error}); free some space, then the same "
            "command goes on from the last checkpoint"
        ) from error


def _finish(
    config: PretrainConfig,
    module: ContrastiveModule,
    trainer: pl.Trainer,
    run_dir: Path,
    seconds: float,
    code: int,
    steps: int,
) -> dict[str, Any]:
    """encoder.safetensors and summary.json of a run that ended well; of another, where its last one is."""
    rows = read_metrics(run_dir / "metrics.csv") if (run_dir / "metrics.csv").is_file() else {}
    known = {name: [value for value in values if math.isfinite(value)] for name, values in rows.items()}
    home = run_dir if code != 3 else read_last(run_dir / "checkpoints")
    summary = {
        "run": str(run_dir),
        "encoder": str(home / "encoder.safetensors") if home is not None else None,
        "steps": trainer.global_step,
        "epochs": trainer.global_step / module.plan.steps_per_epoch,
        "seconds": round(seconds, 1),
        "peak_memory_mib": peak_memory(module.device),
        "metrics": {name: values[-1] for name, values in known.items() if values},
        "finished": code == 0 and trainer.global_step >= steps,
        "bank_used": _is_bank_used(trainer),
    }
    if code != 3:
        _save_encoder(config, module, run_dir)
    if code == 0:
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    finish_wandb(trainer.loggers, summary, run_dir / "encoder.safetensors" if code == 0 else None, code)
    return summary


def _is_bank_used(trainer: pl.Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    return any(each.bank_used for each in callbacks if isinstance(each, WatchMining))


def _save_encoder(config: PretrainConfig, module: ContrastiveModule, folder: Path) -> None:
    save_encoder(folder / "encoder.safetensors", module.encoder, InputSpec.of(config.data), {})


def _dry_run(config: PretrainConfig, given: Given, keep_precision: bool) -> tuple[int, dict[str, Any] | None]:
    """Take a few steps in a folder that is thrown away."""
    check_writable(Path(config.run.root) / config.run.name)
    with tempfile.TemporaryDirectory(prefix="contrastive-dry-run-") as scratch:
        images, plan = _open(config, given)
        timer = StepTimer(SECONDS)
        steps = min(STEPS, plan.total_steps)
        trainer = build_trainer(config, [timer], keep_precision, max_steps=steps)
        module = _build_module(
            config, given, plan, images, trainer, UnreadableFiles(Path(scratch) / "corrupt.csv")
        )
        try:
            with _memory_for_steps():
                trainer.fit(module)
        except (Diverged, TooManyCorrupt) as error:
            logger.error("stopped: %s", error)
            return 3, None
        finally:
            module.miner.close()
        return 0, estimate(timer, module) if trainer.is_global_zero else None

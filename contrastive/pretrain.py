"""Composition root: builds every part of a run from its config, checks all of it, then writes and trains."""

import inspect
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ProgressBar, Timer
from pytorch_lightning.loggers import Logger

from contrastive.callbacks.gallery import Gallery
from contrastive.callbacks.metrics import LogMetrics
from contrastive.callbacks.online import OnlineScores
from contrastive.callbacks.preemption import Preemption
from contrastive.callbacks.profile import ProfileSteps
from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.callbacks.steps import StepTimer
from contrastive.callbacks.watch_health import WatchHealth
from contrastive.callbacks.watch_mining import WatchMining
from contrastive.callbacks.watch_ranks import WatchRanks
from contrastive.checkpoint.folder import forget, read_last, step_of
from contrastive.checkpoint.storage import DirectoryCheckpointIO
from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import nearest
from contrastive.data.loader import build_loader
from contrastive.data.plan import Plan
from contrastive.data.sources import Images, Unreadable, open_labelled_train, open_train
from contrastive.data.tally import TooManyCorrupt
from contrastive.distributed import Collectives, wait_for_all
from contrastive.encoders.build import build_encoder
from contrastive.encoders.weights import load_weights, save_encoder
from contrastive.logging.memory import peak_memory_mib
from contrastive.logging.metrics_csv import MetricsCsv, read_metrics
from contrastive.logging.progress import progress_bar
from contrastive.logging.throughput import Throughput
from contrastive.logging.wandb_logger import alert, build_wandb, finish_wandb
from contrastive.module import ContrastiveModule, Diverged
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
from memory_bank.miner import build_miner
from memory_bank.policy import overruled

logger = logging.getLogger(__name__)
# Set when Lightning is imported: it advertises, and says at INFO what our own lines say. Its warnings stay.
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
"""Trainer settings that belong to us, and what to use instead."""


ALLOWED: dict[str, tuple[Any, ...]] = {
    # Of the networks; views, similarities and the loss are float32 in each.
    "precision": ("32-true", "32", "bf16-mixed", "16-mixed", 32),
    # One process a device, started from the command line: the bank and the checkpoints know no other way.
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"),
    "deterministic": (False, True, "warn", None),
    "detect_anomaly": (False, True),
    "gradient_clip_algorithm": ("norm", "value", None),
}
"""Of settings that Lightning takes as they come, to fail on them late or not to mind them."""

DRY_STEPS, DRY_SECONDS = 12, 20.0
"""A dry run ends after so many optimizer steps, or after so long if it then has two."""


def pretrain(
    config: PretrainConfig,
    *,
    dry_run: bool = False,
    keep_precision: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[int, dict[str, Any] | None]:
    """Train as ``config`` says; return the exit code and the summary (None off rank 0).

    Everything the user can get wrong is checked before the first byte is written.

    Args:
        config: The run.
        dry_run: A few steps in a folder that is thrown away.
        keep_precision: Train in ``trainer.precision`` also on a CPU without bfloat16 instructions, where
            float32 otherwise takes its place.
        callbacks: Your own, called after the run's.

    Raises:
        UserError: wrong input; exit code 2.
    """
    if dry_run:
        return _dry_run(config, keep_precision)
    run_dir = Path(config.run.root) / config.run.name
    images, plan = _open(config)
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
    unreadable = UnreadableFiles(run_dir / "corrupt.csv")
    module = _build_module(config, plan, images, unreadable, resumed=checkpoint is not None)
    saving = _build_saving(config, module, run_dir)
    preemption = Preemption(saving, _time_limit(config.trainer))
    own = _build_callbacks(config, images, run_dir, unreadable)
    trainer = _build_trainer(config, [*own, saving, preemption, *callbacks], keep_precision)
    _check_fit(config, module, trainer)
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


def _open(config: PretrainConfig) -> tuple[Images, Plan]:
    _check_trainer(config.trainer, config.profile)
    images = open_train(config.data)
    _check_readable(images)
    return images, Plan(len(images), config.run.seed, config.data.global_batch, config.schedule.epochs)


def _check_readable(images: Images) -> None:
    """Find one image that can be decoded: a folder without any is refused before anything is written."""
    reason = ""
    for row in range(len(images)):
        try:
            images.read(row)
        except Unreadable as error:
            reason = reason or f"{images.key(row)}: {error}"
        else:
            return
    raise UserError(
        f"none of the {len(images)} images can be read ({reason}); "
        "check data.root, the files' rights and format"
    )


def _check_trainer(given: dict[str, Any], profile: bool) -> None:
    """What Lightning would find out late, or never."""
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
    _time_limit(given)
    _check_launcher(given.get("num_nodes", 1))


def _time_limit(given: dict[str, Any]) -> float | None:
    """Seconds of trainer.max_time. Lightning would count them over all resumes, and end without a word."""
    try:
        return Timer(given.get("max_time")).time_remaining()
    except Exception as error:
        raise UserError(
            f"trainer.max_time={given['max_time']!r}: DD:HH:MM:SS is needed, e.g. 00:12:00:00 for 12 hours"
        ) from error


def _check_launcher(num_nodes: int) -> None:
    """Without one a process would wait for ever for those of the other nodes."""
    launched = SLURMEnvironment.detect() or TorchElasticEnvironment.detect() or "NODE_RANK" in os.environ
    if num_nodes > 1 and not launched:
        raise UserError(
            f"trainer.num_nodes={num_nodes}: nothing says which node this is; start it on each by SLURM "
            "(scripts/slurm.sbatch), by torchrun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT set"
        )


def _build_module(
    config: PretrainConfig, plan: Plan, images: Images, unreadable: UnreadableFiles, *, resumed: bool = False
) -> ContrastiveModule:
    def note_corrupt(row: int, reason: str) -> None:
        unreadable.add(row, images.key(row), reason)

    def loader(module: ContrastiveModule) -> Any:
        trainer = module.trainer
        return build_loader(
            images,
            plan,
            config.data,
            device=module.device,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            whole_plan=True,
            on_corrupt=note_corrupt,
            progress=config.logging.progress,
        )

    labels = images.labels if config.objective.name == "supcon" else None
    if config.objective.name == "supcon" and labels is None:
        raise UserError(
            f"objective.name=supcon: data.name={config.data.name} has no labels; use data.name=imagefolder "
            "with a folder for each class, or another objective"
        )
    torch.manual_seed(config.run.seed)
    try:
        encoder = build_encoder(config.encoder, config.data.image_size)
        if config.encoder.weights is not None and not resumed:  # a checkpoint has every weight
            load_weights(encoder, Path(config.encoder.weights))
        return ContrastiveModule(config, plan, encoder, loader, labels, numbering=images.numbering())
    except RuntimeError as error:  # torch's word for too little memory, and for sizes beyond counting
        raise UserError(
            f"encoder: the networks cannot be made ({str(error).splitlines()[0]}); lower encoder.width, "
            "encoder.projector_hidden or encoder.predictor_hidden"
        ) from error


def _build_saving(config: PretrainConfig, module: ContrastiveModule, run_dir: Path) -> SaveCheckpoint:
    every = config.run.checkpoint_every or module.plan.steps_per_epoch
    return SaveCheckpoint(
        run_dir / "checkpoints",
        every,
        max(2, config.run.keep_last),
        extra_files=lambda _, folder: _save_encoder(config, module, folder),
        in_doubt=lambda: module.in_doubt,
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


def _build_trainer(
    config: PretrainConfig, callbacks: list[pl.Callback], keep_precision: bool, **more: Any
) -> pl.Trainer:
    """Build the trainer, in float32 on a CPU that would emulate bfloat16, unless ``keep_precision``."""
    trainer = _make_trainer(config, callbacks, **more)
    mixed = str(trainer.precision).endswith("mixed")
    if not mixed or trainer.strategy.root_device.type != "cpu" or _cpu_has_bf16():
        return trainer
    given = config.trainer["precision"]
    kept = f"32-true is used; trainer.precision={given} on the command line keeps it"
    if is_first_rank():
        logger.warning(
            "trainer.precision=%s takes about ten times as long as 32-true on this processor, which has no "
            "bfloat16 instructions; %s",
            given,
            "set trainer.precision=32-true" if keep_precision else kept,
        )
    return trainer if keep_precision else _make_trainer(config, callbacks, **more, precision="32-true")


def _cpu_has_bf16() -> bool:
    """Whether this processor computes in bfloat16; torch emulates it elsewhere."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _make_trainer(config: PretrainConfig, callbacks: list[pl.Callback], **more: Any) -> pl.Trainer:
    plugins: list[Any] = [DirectoryCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing saves inside the signal handler, which can hang; we save between steps.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    settings = {"enable_model_summary": False, **config.trainer, **more}
    settings.pop("max_time", None)  # Preemption's
    for callback in callbacks:
        if isinstance(callback, ProfileSteps):
            settings["profiler"] = callback.watch
    try:
        return pl.Trainer(
            **settings,
            max_epochs=1,  # of Lightning: the loader is the whole plan, so a resume is always within it
            plugins=plugins,
            callbacks=callbacks,
            logger=False,
            log_every_n_steps=config.logging.every_n_steps,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            use_distributed_sampler=False,
        )
    except Exception as error:  # all it was given are the user's settings, and it raises a dozen kinds
        raise UserError(f"trainer: {error}; settings given: {config.trainer}") from error


def _check_fit(config: PretrainConfig, module: ContrastiveModule, trainer: pl.Trainer) -> None:
    """What shows once the devices are known."""
    _check_batch(config, trainer)
    _check_batch_norm(config, trainer)
    _check_mining(config, module, trainer)


def _check_batch(config: PretrainConfig, trainer: pl.Trainer) -> None:
    parts = trainer.world_size * trainer.accumulate_grad_batches
    given = (
        f"data.global_batch={config.data.global_batch} over {trainer.world_size} device(s) x "
        f"{trainer.accumulate_grad_batches} accumulated micro-batch(es)"
    )
    if config.data.global_batch % parts:
        near = math.ceil(config.data.global_batch / parts) * parts
        raise UserError(f"{given}: does not divide evenly; use {near}")
    splits = config.encoder.batch_norm_splits if config.encoder.batch_norm == "split" else 1
    if config.data.global_batch // parts < 2 * splits:
        groups = f" in each of the {splits} groups (encoder.batch_norm_splits)" if splits > 1 else ""
        raise UserError(f"{given}: batch norm needs 2 images{groups}; use {2 * splits * parts} or more")


def _check_batch_norm(config: PretrainConfig, trainer: pl.Trainer) -> None:
    kind, ranks, device = config.encoder.batch_norm, trainer.world_size, trainer.strategy.root_device.type
    if kind == "shuffle" and ranks == 1:
        raise UserError(
            "encoder.batch_norm=shuffle computes keys on other devices than their queries, and there is one "
            "device; use encoder.batch_norm=split, or trainer.devices=2 or more"
        )
    if kind == "sync" and ranks > 1 and device == "cpu":
        raise UserError(
            f"encoder.batch_norm=sync works between GPUs, these are {ranks} processes on the CPU; use "
            "encoder.batch_norm=shuffle"
        )


def _check_mining(config: PretrainConfig, module: ContrastiveModule, trainer: pl.Trainer) -> None:
    """Make the bank once and let it go: settings that do not fit each other or the device show themselves."""
    plan = module.plan
    try:
        miner = build_miner(
            config.bank,
            config.mining,
            rows=plan.rows,
            dim=config.encoder.projector_dim,
            seed=config.run.seed,
            device=trainer.strategy.root_device,
            upcoming=plan.ids,
            exchange=Collectives(trainer.world_size),
        )
        approximate = miner.retrieval.approximate
        miner.close()
    except (ValueError, RuntimeError, MemoryError) as error:
        remedy = "; lower bank.capacity or encoder.projector_dim" if _is_out_of_memory(error) else ""
        raise UserError(f"bank and mining: {error}{remedy}") from error
    if trainer.is_global_zero:
        slots = config.bank.capacity or plan.rows
        young = (config.bank.max_age or slots) * config.data.global_batch
        short = too_short_for(config, plan, mines=module.objective.mined, approximate=approximate)
        for line in [*overruled(config.mining, min(slots, young)), *short]:
            logger.warning("%s", line)


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
        module.close()
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
        "peak_memory_mib": _peak_memory(module.device),
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
    save_encoder(folder / "encoder.safetensors", module.encoder, config.encoder, config.data, {})


def _peak_memory(device: torch.device) -> int:
    """MiB: of the accelerator where there is one, else of the process."""
    found = peak_memory_mib(device)
    return round(found.get("system/device_memory_mib", found["system/host_memory_mib"]))


def _dry_run(config: PretrainConfig, keep_precision: bool) -> tuple[int, dict[str, Any] | None]:
    """A few steps in a folder that is thrown away; their median time stands for all."""
    check_writable(Path(config.run.root) / config.run.name)
    with tempfile.TemporaryDirectory(prefix="contrastive-dry-run-") as scratch:
        images, plan = _open(config)
        module = _build_module(config, plan, images, UnreadableFiles(Path(scratch) / "corrupt.csv"))
        timer = StepTimer(DRY_SECONDS)
        steps = min(DRY_STEPS, plan.total_steps)
        trainer = _build_trainer(config, [timer], keep_precision, max_steps=steps)
        _check_fit(config, module, trainer)
        try:
            with _memory_for_steps():
                trainer.fit(module)
        except (Diverged, TooManyCorrupt) as error:
            logger.error("stopped: %s", error)
            return 3, None
        finally:
            module.close()
        if not trainer.is_global_zero:
            return 0, None
        seconds, *spread = (round(each * plan.total_steps) for each in (timer.typical, *timer.quartiles))
        logger.info(
            "%d steps take about %s, %s to %s (h:min:s) at this machine's speed: median and quartiles of %d "
            "steps after the first, slower one; scores, checkpoints and the search of a bank that fills "
            "later are on top",
            plan.total_steps,
            *(timedelta(seconds=each) for each in (seconds, *spread)),
            len(timer.seconds[1:]),
        )
        return 0, {
            "dry_run": True,
            "rows": len(images),
            "steps": plan.total_steps,
            "estimated_seconds": seconds,
            "estimated_seconds_range": spread,
            "peak_memory_mib": _peak_memory(module.device),
            "parameters": sum(weight.numel() for weight in module.encoder.parameters()),
        }

"""Weights & Biases beside Lightning: the logger, pictures, alerts, the end of a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, WandbLogger

from contrastive.config import WandbConfig
from contrastive.logging.names import GROUPS, STEP_AXIS
from contrastive.logging.wandb_run import encoder_name, forgiving, log_encoder, start_run


class RunLogger(WandbLogger):
    """Lightning's logger, but a W&B that fails is told of once, and left alone from then on."""

    failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send a row."""
        if not self.failed:
            with forgiving(f"every row from step {step} on", self._fail):
                super().log_metrics(metrics, step)

    def _fail(self) -> None:
        self.failed = True


def build_wandb(
    config: WandbConfig, run_dir: Path, run_name: str, run_id: str, resolved: dict[str, Any]
) -> RunLogger | None:
    """Start, or continue, the W&B run of a pretraining; None when W&B is off. For rank 0 alone.

    Args:
        config: See start_run.
        run_dir: The run directory.
        run_name: Shown on W&B.
        run_id: W&B's id of the run, kept in the run directory.
        resolved: The whole config, shown on W&B.

    Raises:
        UserError: see start_run.
    """
    run = start_run(
        config, run_dir, pretrain_id=run_id, name=run_name, id=run_id, job_type="pretrain", config=resolved
    )
    if run is None:
        return None
    run.define_metric(STEP_AXIS)
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric=STEP_AXIS)
    return RunLogger(project=config.project, save_dir=run_dir, id=run.id, experiment=run)


def wandb_run(loggers: Iterable[Logger]) -> Any:
    """The W&B run among ``loggers``; None where there is none, or it has failed."""
    found = (each.experiment for each in loggers if isinstance(each, RunLogger) and not each.failed)
    return next(found, None)


def log_media(trainer: Trainer, media: Mapping[str, Any]) -> None:
    """Send pictures and tables to W&B, at the optimizer steps taken so far."""
    run = wandb_run(trainer.loggers)
    if run is not None:
        with forgiving(f"{', '.join(media)} of step {trainer.global_step}"):
            run.log({**media, STEP_AXIS: trainer.global_step})


def alert(trainer: Trainer, title: str, text: str) -> None:
    """Have W&B tell the people who follow the run; nothing without W&B."""
    run = wandb_run(trainer.loggers)
    if run is not None:
        with forgiving(f"the alert {title!r}"):
            run.alert(title, text, level="ERROR")


def finish_wandb(
    loggers: Iterable[Logger], summary: Mapping[str, Any], encoder: Path | None, exit_code: int
) -> None:
    """End the W&B run as the command ends.

    Args:
        loggers: The trainer's.
        summary: What summary.json holds.
        encoder: Kept as an artifact; None of a run that did not end well.
        exit_code: Of the command; 75 marks the run as pre-empted, so that a resume goes on with it.
    """
    run = wandb_run(loggers)
    if run is None:
        return
    with forgiving("the end of the run"):
        run.summary.update({name: value for name, value in summary.items() if name != "metrics"})
        if encoder is not None:
            log_encoder(run, encoder, encoder_name(run.id), {"step": summary["steps"]})
        if exit_code == 75:
            run.mark_preempting()
        run.finish(exit_code)

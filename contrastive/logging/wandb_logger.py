"""Log to Weights & Biases from Lightning: metrics, pictures, alerts, the end of a run."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, WandbLogger

from contrastive.config import WandbConfig
from contrastive.logging.names import GROUPS, STEP_AXIS
from contrastive.logging.wandb_run import encoder_name, forgiving, log_encoder, start_run


class RunLogger(WandbLogger):
    """Lightning's W&B logger that, after a failure of W&B, prints one line and sends nothing more.

    A run that was killed repeats the steps since its last checkpoint. metrics.csv is rewound for that, but
    W&B's history cannot be: values sent are recorded in ``wandb/sent.json`` and not sent again.
    """

    failed = False
    _sent: tuple[int, list[str]] | None = None  # the last step, and the names sent for it

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send a row, except for values that an earlier start has sent."""
        new = self.unsent(metrics, step)
        if new and not self.failed:
            with forgiving(f"every row from step {step} on", self._fail):
                super().log_metrics(new, step)
                self.note_sent(new, step)

    def unsent(self, values: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """Return those of ``values`` that were not yet sent for ``step``."""
        last, names = self._read_note() if self._sent is None else self._sent
        if step is None or step > last:
            return dict(values)
        return {name: value for name, value in values.items() if step == last and name not in names}

    def note_sent(self, values: Mapping[str, Any], step: int | None) -> None:
        """Record on disk that ``values`` of ``step`` were sent."""
        if step is None:
            return
        last, names = self._read_note() if self._sent is None else self._sent
        self._sent = step, [*(names if step == last else []), *values]
        note = {"id": self.experiment.id, "step": step, "names": self._sent[1]}
        self._note.parent.mkdir(parents=True, exist_ok=True)
        partial = self._note.with_suffix(".part")
        partial.write_text(json.dumps(note))
        os.replace(partial, self._note)

    def forget_sent(self) -> None:
        """Allow sending everything again: after a divergence, other settings give other values."""
        self._note.unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return Path(self.save_dir or ".") / "wandb" / "sent.json"

    def _read_note(self) -> tuple[int, list[str]]:
        """Read what an earlier start sent to the same W&B run; nothing if no record can be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self._note.read_text())
            if note["id"] == self.experiment.id:
                return int(note["step"]), list(note["names"])
        return -1, []

    def _fail(self) -> None:
        self.failed = True


def build_wandb(
    config: WandbConfig, run_dir: Path, run_name: str, run_id: str, resolved: dict[str, Any]
) -> RunLogger | None:
    """Start, or continue, the W&B run of a pretraining; None when W&B is off. Call it on rank 0 only.

    Args:
        config: See start_run.
        run_dir: The run directory.
        run_name: Shown on W&B.
        run_id: W&B's id of the run, saved in the run directory.
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
    """Return the W&B run among ``loggers``; None if there is none, or it has failed."""
    logger = _run_logger(loggers)
    return logger.experiment if logger is not None else None


def _run_logger(loggers: Iterable[Logger]) -> RunLogger | None:
    return next((each for each in loggers if isinstance(each, RunLogger) and not each.failed), None)


def log_media(trainer: Trainer, media: Mapping[str, Any]) -> None:
    """Send pictures and tables to W&B for the current optimizer step; each once, see RunLogger."""
    logger, step = _run_logger(trainer.loggers), trainer.global_step
    if logger is not None and (new := logger.unsent(media, step)):
        with forgiving(f"{', '.join(new)} of step {step}"):
            logger.experiment.log({**new, STEP_AXIS: step})
            logger.note_sent(new, step)


def alert(trainer: Trainer, title: str, text: str) -> None:
    """Send a W&B alert to the followers of the run; do nothing without W&B."""
    run = wandb_run(trainer.loggers)
    if run is not None:
        with forgiving(f"the alert {title!r}"):
            run.alert(title, text, level="ERROR")


def finish_wandb(
    loggers: Iterable[Logger], summary: Mapping[str, Any], encoder: Path | None, exit_code: int
) -> None:
    """Finish the W&B run with the exit code of the command.

    Args:
        loggers: The trainer's.
        summary: The content of summary.json.
        encoder: File to log as an artifact; None for a run that did not finish.
        exit_code: Exit code of the command; 75 marks the run as pre-empted, so that a resume continues it.
    """
    logger = _run_logger(loggers)
    if logger is None:
        return
    run = logger.experiment
    with forgiving("the end of the run"):
        if exit_code == 3:
            logger.forget_sent()
        run.summary.update({name: value for name, value in summary.items() if name != "metrics"})
        if encoder is not None:
            log_encoder(run, encoder, encoder_name(run.id), {"step": summary["steps"]})
        if exit_code == 75:
            run.mark_preempting()
        run.finish(exit_code)

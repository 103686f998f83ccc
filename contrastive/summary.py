"""Write the results of a run when it ends: encoder.safetensors and summary.json."""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl

from contrastive.callbacks.build import write_encoder
from contrastive.callbacks.time_budget import TimeBudget
from contrastive.callbacks.watch_mining import WatchMining
from contrastive.callbacks.watcher import standing_warnings
from contrastive.checkpoint.folder import read_last
from contrastive.config import PretrainConfig
from contrastive.data.plan import Plan
from contrastive.logging.memory import peak_memory
from contrastive.logging.metrics_csv import read_metrics
from contrastive.logging.wandb_logger import finish_wandb
from contrastive.module import ContrastiveModule
from memory_bank.replacing import write_text

Kind = TypeVar("Kind", bound=pl.Callback)


def finish(
    config: PretrainConfig,
    module: ContrastiveModule,
    trainer: pl.Trainer,
    run_dir: Path,
    seconds: float,
    code: int,
) -> dict[str, Any]:
    """Write encoder.safetensors and summary.json, finish the W&B run, and return the summary.

    A run that diverged (``code`` 3) writes neither; its summary names the last good
    checkpoint's encoder.
    """
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
        "finished": code == 0 and trainer.global_step >= last_step(config, module.plan),
        "bank_used": _is_bank_used(trainer),
        "warnings": standing_warnings(trainer),
    }
    for budget in _callbacks(trainer, TimeBudget):
        summary |= budget.summary()
        if code == 0:
            budget.tell_use()
    if code != 3:
        write_encoder(config, module, run_dir)
    if code == 0:
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    finish_wandb(trainer.loggers, summary, run_dir / "encoder.safetensors" if code == 0 else None, code)
    return summary


def last_step(config: PretrainConfig, plan: Plan) -> int:
    """Return the optimizer step after which the run ends, by its plan or by ``trainer.max_steps``."""
    most: int = config.trainer.get("max_steps", plan.total_steps)
    return min(most, plan.total_steps)


def _is_bank_used(trainer: pl.Trainer) -> bool:
    return any(each.bank_used for each in _callbacks(trainer, WatchMining))


def _callbacks(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    return [each for each in callbacks if isinstance(each, kind)]

"""Dry run: take a few steps, to estimate time and memory of the whole run."""

import logging
import statistics
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch

from contrastive.lightning_glue import StepCallback
from contrastive.logging.memory import peak_memory
from contrastive.module import ContrastiveModule
from memory_bank.needs import Needs, needs

logger = logging.getLogger(__name__)

STEPS, SECONDS = 12, 20.0
"""A dry run ends after ``STEPS`` optimizer steps, or after ``SECONDS`` if two are done by then."""

CLUSTERS = (8, 64, 512)
"""Numbers of ranks for which a dry run says what a sharded bank needs, if it is sharded or large."""

LARGE_BANK = 2**30
"""Bytes of a large bank."""


class StepTimer(StepCallback):
    """Measures the seconds of each optimizer step; waits for the device, which only a dry run may do.

    Args:
        most_s: Seconds after which training ends; two steps are always taken, as the first includes set-up.

    Attributes:
        seconds: Duration of each step so far.
    """

    def __init__(self, most_s: float) -> None:
        self.most_s = most_s
        self.seconds: list[float] = []

    @property
    def typical(self) -> float:
        """Return the median duration of all steps but the first."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the first and third quartile of the duration of the same steps."""
        measured = self.seconds[1:] or self.seconds
        low, _, high = statistics.quantiles(measured, method="inclusive") if measured[1:] else measured * 3
        return low, high

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic()

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Record the duration of the step; all ranks end at the same step."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        now = time.monotonic()
        self.seconds.append(now - self._since)
        self._since = now
        if trainer.is_global_zero:
            logger.info("step %d: %.2f s", step, self.seconds[-1])
        enough = len(self.seconds) >= 2 and sum(self.seconds) > self.most_s
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)


def estimate(timer: StepTimer, module: ContrastiveModule) -> dict[str, Any]:
    """Log and return the estimate of the whole run from a dry run; with a time budget, of its length."""
    result = _length(timer, module) if module.config.schedule.minutes else _duration(timer, module)
    return {
        "dry_run": True,
        "rows": module.plan.rows,
        **result,
        "peak_memory_mib": peak_memory(module.device),
        "parameters": sum(weight.numel() for weight in module.encoder.parameters()),
    }


def state_needs(module: ContrastiveModule, ranks: int) -> dict[str, float]:
    """Log what the bank needs on each rank, of this run and of a cluster; return that of this run in MiB."""
    bank, miner, batch = module.config.bank, module.miner, module.config.data.global_batch
    here = needs(miner, ranks if bank.placement == "sharded" else 1, batch)
    if module.reads_bank:
        logger.info("MiB a rank: %s bank.placement=%s, %d rank(s)", _mib(here), bank.placement, ranks)
    for number in CLUSTERS if here.bank > LARGE_BANK or bank.placement == "sharded" else ():
        if number <= miner.bank.capacity:
            logger.info("MiB a rank: %s sharded, %d ranks", _mib(needs(miner, number, batch)), number)
    sizes = {"bank": here.bank, "index": here.index, "lookup": here.traffic}
    return {f"{name}_mib": round(size / 2**20, 1) for name, size in sizes.items()}


def _mib(found: Needs) -> str:
    bank, index, traffic = (value / 2**20 for value in (found.bank, found.index, found.traffic))
    return f"bank {bank:9.1f}, index {index:9.1f}, look-ups {traffic:8.1f} a step;"


def _duration(timer: StepTimer, module: ContrastiveModule) -> dict[str, Any]:
    """Estimate the seconds of a run whose steps are known."""
    steps = module.plan.total_steps
    seconds, *spread = (round(each * steps) for each in (timer.typical, *timer.quartiles))
    logger.info(
        "%d steps take about %s, %s to %s (h:min:s) at this machine's speed: median and quartiles of %d "
        "steps after the first, slower one; scores, checkpoints and the search of a bank that fills "
        "later are on top",
        steps,
        *(timedelta(seconds=each) for each in (seconds, *spread)),
        len(timer.seconds[1:]),
    )
    return {"steps": steps, "estimated_seconds": seconds, "estimated_seconds_range": spread}


def _length(timer: StepTimer, module: ContrastiveModule) -> dict[str, Any]:
    """Estimate the steps of a run whose time is known."""
    minutes = module.config.schedule.minutes
    assert minutes is not None
    steps, most, fewest = (max(1, int(60 * minutes / each)) for each in (timer.typical, *timer.quartiles))
    epochs = steps / module.plan.steps_per_epoch
    logger.info(
        "schedule.minutes=%g is enough for about %d steps, %.1f epochs, at this machine's speed: median of "
        "%d steps after the first, slower one; %d to %d by their quartiles. Starting, scores, checkpoints "
        "and the search of a bank that fills later leave time for fewer",
        minutes,
        steps,
        epochs,
        len(timer.seconds[1:]),
        fewest,
        most,
    )
    return {
        "steps": steps,
        "steps_range": [fewest, most],
        "epochs": round(epochs, 2),
        "estimated_seconds": round(60 * minutes),
    }

"""Set the length of a run by its time budget (``schedule.minutes``)."""

import logging
import math
import time
from bisect import bisect_right
from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

import pytorch_lightning as pl

from contrastive.data.plan import NO_END, Plan, in_first_half
from contrastive.distributed import from_first_rank
from contrastive.lightning_glue import StepCallback, end_after
from contrastive.logging.throughput import Clock
from contrastive.module import ContrastiveModule
from contrastive.short_run import too_short_for

logger = logging.getLogger(__name__)

_UNMEASURED = 2
"""Steps of each start that are not measured: they compile, allocate and decode."""

_FEWEST = 3
"""Steps that a speed is measured over, or more."""

_FIRST_SHARE = 0.02
"""Share of the budget that is measured before the first estimate."""

_TOLERANCE = 0.01, 0.04
"""Shares of the budget and of what is left of it. By their sum, and by a step, the predicted end may be off
before the length changes: schedules stay as they are where the speed only fluctuates."""

_MARGIN = 0.01
"""Share of the budget left for what nothing measures: the encoder, the summary, the end of the process."""

_NEWS = 1 / 3
"""Share of the length that was logged last by which another one differs that is logged."""

_EXCEEDED, _MUCH = 1.1, 1 / 3
"""Multiples of the budget that the run, or work beside training, may take before its use is itemized."""

_FEW = 20
"""Steps that should at least fit into the budget: if the first one is too slow for that, it is said."""

_DECISIONS = 200
"""Decisions in a run; between two, ranks need not talk."""


@dataclass
class Work:
    """Work beside training, e.g. scoring; the end of the run is one of its occasions.

    Attributes:
        every: Optimizer steps between two occasions; None for the end alone.
        seconds: Duration of the last one.
    """

    every: int | None
    seconds: float

    def rest_s(self, step: int, total: int) -> float:
        """Estimate the seconds of the occasions from ``step`` to the end of a run of ``total`` steps."""
        if self.every is None:
            return self.seconds
        return self.seconds * (math.ceil(total / self.every) - (step - 1) // self.every)


class Pace:
    """Decides after how many optimizer steps a run ends, from the time that recent steps and other work took.

    The speed is the mean over the last quarter of the time that is left: long while there is much to predict,
    short when a change of the machine's load must be answered at once. It reads no clock: all times are
    handed to it, in seconds of the budget.

    Args:
        budget_s: Seconds of the whole run.
        first_cost: Estimated cost of a step of the first half of the run over that of one of the second half.

    Attributes:
        work: Other work by its name; kept over resumes by the caller.
    """

    def __init__(self, budget_s: float, first_cost: float = 1.0) -> None:
        self.budget_s, self.first_cost = budget_s, first_cost
        self.work: dict[str, Work] = {}
        self._taken, self._spent_s, self._paused_s = 0, 0.0, 0.0
        self._last, self._done = 0, 0.0  # the last step; the cost of all, in steps of the second half
        self._marks: deque[tuple[float, float]] = deque()  # cost, seconds without other work
        self._is_measured = False

    @property
    def step_s(self) -> float:
        """Return the seconds of an optimizer step, without other work; NaN before two steps were measured."""
        if len(self._marks) < 2:
            return math.nan
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (ended - began) / (last - first)

    def cost(self, step: int, total: int) -> float:
        """Return the cost from ``step`` to the end of a run of ``total``, in steps of the second half."""
        of_first_half = max(0, math.ceil(total / 2) - step)
        return total - step + (self.first_cost - 1) * of_first_half

    def note_step(self, step: int, spent_s: float, total: int = NO_END) -> None:
        """Note that ``step`` of ``total`` optimizer steps are done when ``spent_s`` seconds are spent."""
        self._done += (step - self._last) * (self.first_cost if in_first_half(step - 1, total) else 1)
        self._taken, self._spent_s, self._last = self._taken + 1, spent_s, step
        if self._taken < _UNMEASURED:
            return
        now, window = spent_s - self._paused_s, (self.budget_s - spent_s) / 4
        self._marks.append((self._done, now))
        while len(self._marks) > _FEWEST + 1 and self._marks[1][1] <= now - window:
            self._marks.popleft()
        measured_s = now - self._marks[0][1]
        self._is_measured |= len(self._marks) > _FEWEST and measured_s >= _FIRST_SHARE * self.budget_s

    def note_work(self, name: str, every: int | None, seconds: float) -> None:
        """Note that work, which is due every so many steps, took ``seconds`` since the last step."""
        self.work[name] = Work(every, seconds)
        self._paused_s += seconds

    def end_s(self, step: int, total: int) -> float:
        """Predict the seconds spent at the end of a run of ``total`` steps; ``step`` are just done."""
        training_s = self.step_s * self.cost(step, total)
        return self._spent_s + training_s + sum(work.rest_s(step, total) for work in self.work.values())

    def decide(self, step: int, total: int | None) -> int | None:
        """Choose the number of steps after which the run ends.

        Args:
            step: Optimizer steps done.
            total: The number chosen before; None before the first.

        Returns:
            ``total`` while too little was measured, and where it ends the run in time; else another number.
            It is ``step + 2`` or more, unless ``total`` is less: by then the learning rate follows it.
        """
        target_s, soonest = (1 - _MARGIN) * self.budget_s, step + 2
        left_s = target_s - self._spent_s
        at_once = soonest if total is None else min(total, soonest)
        if left_s <= 0:
            return at_once
        if not self._is_measured:
            return total
        allowed_s = _TOLERANCE[0] * self.budget_s + _TOLERANCE[1] * left_s + self.step_s
        if total is not None and abs(self.end_s(step, total) - target_s) <= allowed_s:
            return total
        most = soonest + math.ceil(left_s / self.step_s / min(1, self.first_cost))
        fitting = bisect_right(range(soonest, most), target_s, key=lambda total: self.end_s(step, total))
        return soonest + fitting - 1 if fitting else at_once


class TimeBudget(StepCallback, Clock):
    """Ends the run after ``schedule.minutes``, by setting the length of its plan to what the speed allows.

    Rank 0 measures and decides; every rank has the same length in every step. Put it before callbacks that
    do other work. A resumed run continues the time and the length of its checkpoint.

    Args:
        minutes: The budget, counted from the construction of this callback.
        first_cost: Cost of a step of the first half of the run over that of one of the second half.
    """

    def __init__(self, minutes: float, first_cost: float = 1.0) -> None:
        self.minutes, self.pace = minutes, Pace(60 * minutes, first_cost)
        self._since, self._before_s = time.monotonic(), 0.0
        self._told = 0
        self._before_first_s: float | None = None  # training before the first step, if no length is known yet
        self._beside_s: dict[str, float] = {}  # work beside training

    @property
    def spent_s(self) -> float:
        """Return the seconds since construction, and before the checkpoint that the run continued from."""
        return self._before_s + time.monotonic() - self._since

    @property
    def _training_s(self) -> float:
        """Return the seconds spent without work beside training."""
        return self.spent_s - sum(self._beside_s.values())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the plan: a checkpoint, which is read before the loader exists, sets its length."""
        assert isinstance(pl_module, ContrastiveModule)
        self._plan: Plan = pl_module.plan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is left, in a resumed run; else tell Lightning that the length is not known yet."""
        super().on_train_start(trainer, pl_module)
        self._note_beside("preparation", time.monotonic() - self._since)
        assert isinstance(pl_module, ContrastiveModule)
        if not self._plan.has_end:
            end_after(trainer, None)
            self._before_first_s = self._training_s
        elif trainer.is_global_zero:
            self._tell(
                f"as planned before; {self.spent_s / 60:.1f} min are spent, "
                f"{(self.spent_s - self._before_s) / 60:.1f} of them on this start"
            )
            _warn_if_too_short(pl_module)

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Measure the step; decide on the length of the run, about 200 times in all."""
        if self._before_first_s is not None:
            if trainer.is_global_zero:
                self._tell_if_slow(self._training_s - self._before_first_s)
            self._before_first_s = None
        self.pace.note_step(step, self.spent_s, self._plan.total_steps)
        total = self._plan.total_steps if self._plan.has_end else None
        if total is not None and (step >= total or step % max(1, total // _DECISIONS)):
            return
        decided = from_first_rank(self.pace.decide(step, total) or 0, module.device)
        if decided not in (0, total):
            self._plan.end_after(decided)
            end_after(trainer, decided)
            if trainer.is_global_zero and abs(decided - self._told) > _NEWS * self._told:
                first = not self._told
                self._tell(f"{self._speed(step)} at step {step}")
                if first:
                    _warn_if_too_short(module)

    def leave_out(self, work: str, every: int | None, seconds: float) -> None:
        """Note work beside training, which takes time from the budget as well."""
        self.pace.note_work(work, every, seconds)
        self._note_beside(work, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the time spent, the length of the run, and the work beside training, last and in sum."""
        return {
            "spent_s": self.spent_s,
            "total_steps": self._plan.total_steps if self._plan.has_end else None,
            "work": {name: list(astuple(work)) for name, work in self.pace.work.items()},
            "beside_s": self._beside_s,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; the seconds since the construction are spent as well."""
        self._before_s = float(state_dict["spent_s"])
        self._beside_s = dict(state_dict.get("beside_s", {}))  # older checkpoints have none
        self.pace.work = {name: Work(*values) for name, values in state_dict["work"].items()}
        if state_dict["total_steps"] is not None:
            self._plan.end_after(state_dict["total_steps"])

    def summary(self) -> dict[str, Any]:
        """Return the budget, what is spent of it, and the steps that fit; None if they were never known."""
        return {
            "budget_minutes": self.minutes,
            "spent_minutes": round(self.spent_s / 60, 3),
            "planned_steps": self._plan.total_steps if self._plan.has_end else None,
        }

    def tell_use(self) -> None:
        """Log what the run took; also for what, if that exceeds the budget or much of it was other work."""
        spent_s, beside_s = self.spent_s, sum(self._beside_s.values())
        told = [f"{spent_s / 60:.3g} min"]
        if spent_s > _EXCEEDED * 60 * self.minutes or beside_s > _MUCH * 60 * self.minutes:
            parts = {"training": spent_s - beside_s} | self._beside_s
            shares = sorted(((seconds / spent_s, work) for work, seconds in parts.items()), reverse=True)
            told += [f"{share:.0%} {work}" for share, work in shares if share >= 0.01]
        logger.info(
            "schedule.minutes=%g: %d steps, %.1f epochs; the run took %s",
            *(self.minutes, self._seen, self._seen / self._plan.steps_per_epoch, ", ".join(told)),
        )

    def _note_beside(self, work: str, seconds: float) -> None:
        self._beside_s[work] = self._beside_s.get(work, 0.0) + seconds

    def _tell_if_slow(self, first_s: float) -> None:
        """Log what the first step took, if few like it fit into what is left of the budget."""
        left_s = 60 * self.minutes - self.spent_s
        fitting = max(0, int(left_s / max(first_s, 1e-9)))
        if fitting < _FEW:
            logger.info(
                "the first step took %.3g s: schedule.minutes=%g has time for fewer than %d more like it; "
                "smaller ones are faster (data.image_size, data.global_batch, data.frames, encoder.name)",
                *(first_s, self.minutes, fitting + 1),
            )

    def _tell(self, why: str) -> None:
        """Log the length of the run."""
        self._told = self._plan.total_steps
        logger.info(
            "schedule.minutes=%g: the run has %d steps, %.1f epochs (%s)",
            self.minutes,
            self._told,
            self._told / self._plan.steps_per_epoch,
            why,
        )

    def _speed(self, step: int) -> str:
        cost = self.pace.first_cost if in_first_half(step, self._plan.total_steps) else 1
        images_s = self._plan.global_batch / (self.pace.step_s * cost)
        return "the time was over" if math.isnan(images_s) else f"{images_s:.0f} images/s"


def _warn_if_too_short(module: ContrastiveModule) -> None:
    approximate = module.miner.retrieval.approximate
    for line in too_short_for(module.config, module.plan, mines=module.mines, approximate=approximate):
        logger.warning("%s", line)

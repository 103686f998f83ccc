"""Profile the parts of a training step (``profile=true``)."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler

from contrastive.lightning_glue import StepCallback, log_row
from contrastive.module import ContrastiveModule

logger = logging.getLogger(__name__)

PARTS = (
    "data_wait",
    "transfer",
    "augmentation",
    "query",
    "key",
    "mining",
    "loss",
    "backward",
    "optimizer",
    "other",
)
"""Parts of a step; ``optimizer`` includes the key network's average, ``other`` is Lightning and callbacks."""

_ACTIONS = {
    ".train_dataloader_next": "data_wait",
    ".batch_to_device": "transfer",
    ".training_step": "other",
    ".backward": "backward",
    ".optimizer_step": "optimizer",
}
"""End of each action name of Lightning's profiler, and the part it belongs to."""


class Stopwatch(PassThroughProfiler):
    """Measures seconds per part; one part runs at a time, and a nested part interrupts the outer one.

    Idle until :meth:`begin`; then each change of part waits for the device, so that work is counted in the
    part that enqueued it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts: list[str] = []
        self._since, self._device = 0.0, torch.device("cpu")

    @property
    def running(self) -> bool:
        """Return whether the clock runs: between begin and end."""
        return bool(self._parts)

    def begin(self, device: torch.device) -> None:
        """Start the clock in the part ``other``."""
        self._device, self._parts = device, ["other"]
        self._lap()

    def end(self) -> None:
        """Stop the clock."""
        self._lap(self._parts[-1])
        self._parts = []

    def enter(self, part: str) -> None:
        """Count time as ``part`` from here on."""
        self._lap(self._parts[-1])
        self._parts.append(part)

    def leave(self) -> None:
        """Return to the enclosing part."""
        self._lap(self._parts.pop())

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``call`` so that its time counts as ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return run

    def start(self, action_name: str) -> None:
        """Enter the part of an action that Lightning starts."""
        if self.running and (part := _part(action_name)):
            self.enter(part)

    def stop(self, action_name: str) -> None:
        """Leave the part of an action that Lightning ends."""
        if self.running and _part(action_name):
            self.leave()

    def _lap(self, part: str | None = None) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if part is not None:
            self.seconds[part] += now - self._since
        self._since = now


class ProfileSteps(StepCallback):
    """Prints and logs ``perf/share_*`` of some steps after the warm-up, with a filled bank where it is read.

    These steps wait for the device between parts, so they are slower than others; their results are equal.

    Args:
        skip: Steps to skip first, while allocators, compilers and algorithm searches warm up.
        steps: Steps to measure.

    Attributes:
        watch: The stopwatch; pass it to the trainer as its profiler.
    """

    def __init__(self, skip: int = 10, steps: int = 30) -> None:
        self.skip, self.steps = skip, steps
        self.watch = Stopwatch()
        self._taken, self._measured, self._done = 0, 0, False
        self._replaced: list[tuple[Any, str, Any]] = []

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Begin measuring after the warm-up, count steps, and finish after ``steps``."""
        if self._done:
            return
        self._taken += 1
        if self.watch.running:
            self._measured += 1
            if self._measured == self.steps:
                self._finish(trainer, module)
        elif self._taken >= self.skip and (module.miner.ready() or not module.reads_bank):
            self._time_parts(module)
            self.watch.begin(module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the steps measured so far if the run ended early."""
        assert isinstance(pl_module, ContrastiveModule)
        if self._measured and not self._done:
            self._finish(trainer, pl_module)
        elif not self._done:
            schedule, filled = pl_module.config.schedule, " and until the bank is filled to mining.min_fill"
            logger.warning(
                "profile=true: the run ended after %d steps, and none was measured: that begins after %d "
                "steps%s; raise %s",
                self._taken,
                self.skip,
                filled if pl_module.reads_bank else "",
                "trainer.max_steps or schedule.epochs" if schedule.minutes is None else "schedule.minutes",
            )

    def _time_parts(self, module: ContrastiveModule) -> None:
        """Replace the functions of the step by timed ones."""
        miner, networks, method = module.miner, module.networks, module.method
        for owner, name, part in (
            (module, "views", "augmentation"),
            (module, "_first_views", "augmentation"),
            (networks, "encode_frames", "query"),
            (networks, "embed_frames", "query"),
            (networks, "embed_key", "key"),
            (miner, "negatives", "mining"),
            (miner, "nearest", "mining"),
            (miner, "write", "mining"),
            (method, "objective", "loss"),
        ):
            if hasattr(owner, name):
                self._replace(owner, name, self.watch.timed(part, getattr(owner, name)))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value

    def _finish(self, trainer: pl.Trainer, module: ContrastiveModule) -> None:
        self.watch.end()
        self._done = True
        for owner, name, value in self._replaced:
            if value is None:  # a method of the class
                del vars(owner)[name]
            else:
                vars(owner)[name] = value
        total = sum(self.watch.seconds.values())
        shares = {part: seconds / total for part, seconds in self.watch.seconds.items()}
        log_row(trainer, {f"perf/share_{part}": share for part, share in shares.items()} | module.progress())
        if trainer.is_global_zero:
            step_ms = 1e3 * total / self._measured
            lines = [f"  {part:12} {share:6.1%} {share * step_ms:9.2f} ms" for part, share in shares.items()]
            logger.info(
                "profile of %d steps of %.1f ms, which wait for the device between parts:\n%s",
                self._measured,
                step_ms,
                "\n".join(lines),
            )


def _part(action: str) -> str | None:
    return next((part for end, part in _ACTIONS.items() if action.endswith(end)), None)

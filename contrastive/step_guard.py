"""Skip optimizer steps whose loss is not finite on any rank, and stop a run that diverged."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from contrastive.batch_norm import BufferSnapshot
from contrastive.distributed import all_true, rank, zero_of

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Training diverged and was stopped. Exit code 3.

    Args:
        reason: What went wrong.
        since: Number of optimizer steps after which the weights were last known to be good.
        remedy: What the user can do.
    """

    def __init__(
        self,
        reason: str,
        since: int,
        remedy: str = "Lower optimizer.base_lr, lengthen schedule.warmup_epochs, or set "
        "trainer.gradient_clip_val=1; where strengths of augment are unusual, lower those",
    ) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.since = since


class StepGuard:
    """Skips and counts optimizer steps with a bad loss or no images; raises ``Diverged`` if they persist.

    Call ``attach`` first; ``note`` or ``note_left_out`` for each micro-batch; ``before_step`` before and
    ``after_step`` after each optimizer step.

    Args:
        total_steps: Returns the optimizer steps of the run, which a time budget may change.
        explain_no_negatives: Returns the message for a step in which no query had a negative.

    Attributes:
        skipped_steps: Optimizer steps skipped since the run began.
    """

    patience = 3
    """Stop after this many consecutive optimizer steps whose loss is not finite."""

    idle_patience = 100
    """Stop after this many consecutive steps in which no query had a negative (or half of a shorter run)."""

    least_loss_scale = 1.0
    """Smallest loss scale accepted under 16-mixed; below, gradients overflow even unscaled."""

    def __init__(self, total_steps: Callable[[], int], explain_no_negatives: Callable[[], str]) -> None:
        self._total_steps, self._explain = total_steps, explain_no_negatives
        self._scaler: GradScaler | None = None
        self._flags: list[AsyncFlags] = []
        self._num_empty = 0
        self._skipped_in_a_row = self._idle_in_a_row = 0
        self._overflowed, self._last_finite = False, -1
        self._warned_idle = self._warned_left_out = False
        self.skipped_steps = 0

    def attach(self, module: nn.Module, scaler: GradScaler | None = None) -> None:
        """Guard ``module``, which is on its training device.

        Args:
            module: After a skipped step, its gradients are dropped and its buffers (batch norm's statistics)
                are restored.
            scaler: Loss scaler of ``trainer.precision=16-mixed``, else None.
        """
        self._module, self._scaler, self._buffers = module, scaler, BufferSnapshot(module)

    @property
    def in_doubt(self) -> bool:
        """Return whether the last loss, or its gradients, were not finite: the weights may be the reason."""
        return self._skipped_in_a_row > 0 or self._overflowed

    def note(self, loss: Tensor, diagnostics: dict[str, Tensor]) -> None:
        """Check that the loss is finite on all ranks, without waiting for the device."""
        idle = diagnostics.get("effective_negatives", torch.ones((), device=loss.device)) == 0
        self._flags.append(AsyncFlags(all_true(torch.stack([torch.isfinite(loss.detach()), idle]))))

    def note_left_out(self, step: int) -> Tensor:
        """Skip a micro-batch on all ranks: one of them has fewer than two images, too few for batch norm.

        Returns:
            A loss of 0 whose gradient is 0 for each weight; DDP waits for all of them.
        """
        weights = [weight for weight in self._module.parameters() if weight.requires_grad]
        self._flags.append(AsyncFlags(torch.tensor([True, False], device=weights[0].device)))
        self._num_empty += 1
        if not self._warned_left_out and rank() == 0:
            self._warned_left_out = True
            logger.warning(
                "a rank could read fewer than 2 of its images of step %d (corrupt.csv lists the others), so "
                "the micro-batch is left out; a step without any other counts in train/skipped_steps",
                step,
            )
        return zero_of(weights)

    def before_step(self, optimizer: Optimizer) -> None:
        """Drop all gradients if any rank's loss is not finite or the step has no image, so no weight changes.

        Gradients of 0 would not do: momentum and weight decay would still change the weights.
        """
        finite, idle = zip(*(flags.read() for flags in self._flags), strict=True)
        self._is_sound, self._is_idle = all(finite), all(idle)
        self._is_empty = self._num_empty == len(self._flags)
        self._flags, self._num_empty = [], 0
        self._loss_scale = self._read_loss_scale()
        if self._is_empty or not self._is_sound:
            optimizer.zero_grad(set_to_none=True)

    def after_step(self, step: int) -> bool:
        """Return whether the weights moved; count the step, and restore the buffers if they did not.

        If they moved, call ``keep_buffers`` once the key network and the bank are updated.

        Raises:
            Diverged: ``patience`` or ``idle_patience`` is exceeded, or the loss scale fell too low.
        """
        taken = self._is_taken(step)
        if taken:
            self._count_idle(step)
        else:
            self._buffers.restore()
        return taken

    def keep_buffers(self) -> None:
        """Save a copy of the buffers after a step that was taken."""
        self._buffers.keep()

    def check_weights(self, step: int) -> None:
        """Check that weights and running statistics are finite.

        After the last step no loss would show it, and running statistics never enter the training loss.

        Raises:
            Diverged: one of them is not finite.
        """
        weights = [weight for weight in self._module.parameters() if weight.requires_grad]
        statistics = [buffer for buffer in self._module.buffers() if buffer.is_floating_point()]
        norms = torch._foreach_norm(weights + statistics)
        if not torch.stack(list(norms)).isfinite().all():
            raise Diverged(
                f"weights or running statistics are not finite after {step} optimizer steps",
                since=self._last_finite,
            )

    def state_dict(self) -> list[int]:
        """Return the counts to save in a checkpoint."""
        return [self.skipped_steps, self._skipped_in_a_row]

    def load_state_dict(self, state: Sequence[int], step: int) -> None:
        """Restore the counts of a checkpoint that was saved after ``step`` optimizer steps."""
        self.skipped_steps, self._skipped_in_a_row = state
        self._last_finite = step - 1 - self._skipped_in_a_row

    def _is_taken(self, step: int) -> bool:
        loss_scale = self._read_loss_scale()
        self._overflowed = loss_scale < self._loss_scale  # the scaler's answer to an overflow
        taken = self._is_sound and not self._is_empty and not self._overflowed
        self.skipped_steps += not taken
        if self._is_empty:  # there was no loss to check
            return False
        self._skipped_in_a_row = 0 if self._is_sound else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.patience:
            raise Diverged(
                f"the loss was not finite {self.patience} optimizer steps in a row, the last is step {step}",
                since=self._last_finite,
            )
        if self._is_sound and self._overflowed and loss_scale < self.least_loss_scale:
            raise Diverged(
                f"gradients overflow float16 at a loss scale of {loss_scale:g}, the last at step {step}",
                since=self._last_finite,
                remedy="Set trainer.precision=bf16-mixed, which has float32's range, or 32-true",
            )
        if taken:
            self._last_finite = step
        return taken

    def _count_idle(self, step: int) -> None:
        self._idle_in_a_row = self._idle_in_a_row + 1 if self._is_idle else 0
        patience = min(self.idle_patience, -(-self._total_steps() // 2))
        if self._idle_in_a_row >= patience:
            raise Diverged(
                f"no query had a negative for {patience} optimizer steps, the last is step {step}",
                since=step - patience + 1,
                remedy=self._explain(),
            )
        if self._is_idle and not self._warned_idle and rank() == 0:
            self._warned_idle = True
            logger.warning("no query of step %d has a negative: nothing is learnt. %s", step, self._explain())

    def _read_loss_scale(self) -> float:
        """Return the loss scale, which the scaler lowers when it skips a step. Waits for the device."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()


class AsyncFlags:
    """Flags copied to the host without blocking; reading them waits only for what was enqueued before them.

    Create them right after the loss and read them once the backward pass was started: the GPU is then never
    idle, because it runs the backward pass while the host waits for the flags.
    """

    def __init__(self, flags: Bool[Tensor, " f"]) -> None:
        self._flags = flags.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None

    def read(self) -> list[bool]:
        """Wait for the flags and return them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return list(map(bool, self._flags))


def explain_no_negatives(dropped: Mapping[str, Tensor]) -> str:
    """Describe which filters remove all negatives, from the share that each drops."""
    drops = [f"mining.{name} drops {float(share):.1%}" for name, share in dropped.items() if share]
    if not drops:
        return "The bank holds no other image; a higher mining.min_fill lets it fill first"
    return f"Of the bank's rows {', '.join(drops)}; loosen that, in a new run"

"""Compute which rows each optimizer step and each rank takes; loader, miner and resume share the plan."""

from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.order.base import BankOrder, Order
from contrastive.data.order.global_ import GlobalOrder


@dataclass(frozen=True)
class Share:
    """The part of each global batch that one process takes.

    Attributes:
        rank: This process.
        world: Number of processes.
        accumulate: Micro-batches of one optimizer step.

    Raises:
        ValueError: world or accumulate below 1, or no such rank.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or self.accumulate < 1:
            raise ValueError(f"{self}: world and accumulate of 1 or more are needed")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"{self}: the rank must be below world")


WHOLE = Share()
"""The whole batch, in one process without accumulation."""


NO_END = 2**40
"""Number of optimizer steps while the length of a run is not known: schedules stay where they begin."""


def in_first_half(step: int, total: int) -> bool:
    """Return whether optimizer step ``step``, from 0, is in the first half of a run of ``total`` steps."""
    return 2 * step < total


@dataclass
class Plan:
    """The rows of every optimizer step of a run.

    An epoch visits all rows in its order, cut into batches of ``global_batch``; the remainder
    that does not fill one is left out of that epoch. Nothing is padded or repeated. Ranks and micro-batches
    are slices of the same global batch, so a run resumes at another world size with the same images in the
    same steps.

    The rows of a step never change. The number of steps may, in a run with a time budget (``end_after``):
    read ``total_steps`` where it is needed, and keep no copy.

    Attributes:
        rows: Images of the training set.
        seed: In [0, 2**32), as run.seed.
        global_batch: Images of one optimizer step, over all ranks and micro-batches.
        epochs: Passes over the data, of which the last may be cut short; None as long as nobody knows.
        order: Order in which each epoch visits the rows; None is ``data.order=global`` with ``seed``.
        total_steps: Optimizer steps of the run; ``NO_END`` if ``epochs`` is None.

    Raises:
        UserError: fewer rows than one batch takes.
        ValueError: a number below 1, or a negative seed.
    """

    rows: int
    seed: int
    global_batch: int
    epochs: int | None
    order: Order | None = None
    total_steps: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = min(self.rows, self.global_batch, 1 if self.epochs is None else self.epochs)
        if least < 1 or self.seed < 0:
            raise ValueError(
                f"{self}: rows, global_batch and epochs of 1 or more and a seed of 0 or more are needed"
            )
        if self.rows < self.global_batch:
            raise UserError(
                f"data.global_batch={self.global_batch} is larger than the data set, which has {self.rows} "
                f"to train on; set data.global_batch to {self.rows} or less, or add more"
            )
        self.total_steps = NO_END if self.epochs is None else self.steps_per_epoch * self.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.rows // self.global_batch

    @property
    def has_end(self) -> bool:
        """Return whether the length of the run is known."""
        return self.epochs is not None

    def end_after(self, steps: int) -> None:
        """Set the length of the run to ``steps`` optimizer steps, 1 or more."""
        if steps < 1:
            raise ValueError(f"steps={steps}: a run has 1 or more")
        self.total_steps, self.epochs = steps, -(-steps // self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of optimizer step ``step``, both from 0."""
        return step // self.steps_per_epoch

    def known_until(self, step: int) -> int:
        """Return the step up to which, exclusive, the rows are decided once ``step`` is reached.

        That is the end of the run, or of the step's epoch if the next one is composed from the bank.
        """
        if isinstance(self.order, BankOrder):
            return min(self.total_steps, (self.epoch_of(step) + 1) * self.steps_per_epoch)
        return self.total_steps

    def epoch_ids(self, epoch: int) -> Int[Tensor, " n"]:
        """Return the rows of all steps of ``epoch``, int64."""
        return self._positions(epoch, 0, self.steps_per_epoch * self.global_batch)

    def ids(self, step: int) -> Int[Tensor, " g"]:
        """Return the rows of optimizer step ``step``, over all ranks and micro-batches, int64.

        Raises:
            ValueError: the step is not in ``range(total_steps)``.
        """
        return self._slice(step, 0, self.global_batch)

    def local_ids(self, step: int, micro: int, share: Share) -> Int[Tensor, " b"]:
        """Return the part of ``ids(step)`` that ``share`` takes in one of its micro-batches.

        Contiguous, by micro-batch and then by rank: the first micro-batch of all ranks together is the
        first part of the global batch.

        Raises:
            UserError: the global batch does not divide evenly.
            ValueError: step or micro out of range.
        """
        size = self.local_batch(share)
        if not 0 <= micro < share.accumulate:
            raise ValueError(f"micro={micro} of {share.accumulate}: it must be below its count")
        return self._slice(step, (micro * share.world + share.rank) * size, size)

    def local_batch(self, share: Share) -> int:
        """Count the images of one micro-batch on one rank.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        parts = share.world * share.accumulate
        if self.global_batch % parts:
            below = self.global_batch // parts * parts
            near = f"{below} or {below + parts}" if below >= 2 * parts else f"{2 * parts}"
            raise UserError(
                f"data.global_batch={self.global_batch} does not divide evenly over {share.world} ranks x "
                f"{share.accumulate} accumulated micro-batches; nearest that do: {near}"
            )
        return self.global_batch // parts

    def _slice(self, step: int, start: int, count: int) -> Tensor:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step={step}: the plan has steps 0 to {self.total_steps - 1}")
        start += step % self.steps_per_epoch * self.global_batch
        return self._positions(self.epoch_of(step), start, start + count)

    def _positions(self, epoch: int, start: int, stop: int) -> Tensor:
        order = GlobalOrder(self.rows, self.seed) if self.order is None else self.order
        return order.ids(epoch, start, stop)

"""Who sees which image when: one pure function of (seed, epoch), read by loader, miner and resume alike."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import UserError


@dataclass(frozen=True)
class Plan:
    """The order of a whole run.

    An epoch is a fresh permutation of all rows, cut into batches of ``global_batch``; the shuffled
    remainder that does not fill one is left out of that epoch. Nothing is padded or repeated. The plan
    knows nothing of processes: ranks and micro-batches are slices of the same global batch, so a run
    goes on at another world size with the same images in the same steps.

    Attributes:
        rows: Images of the training set.
        seed: In [0, 2**32), as run.seed.
        global_batch: Images of one optimizer step, over all ranks and micro-batches.
        epochs: Passes over the data.

    Raises:
        UserError: fewer rows than one batch takes.
        ValueError: a number below 1, or a negative seed.
    """

    rows: int
    seed: int
    global_batch: int
    epochs: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch < 1 or self.epochs < 1 or self.seed < 0:
            raise ValueError(
                f"{self}: rows, global_batch and epochs of 1 or more and a seed of 0 or more are needed"
            )
        if self.rows < self.global_batch:
            raise UserError(
                f"data.global_batch={self.global_batch} is larger than the data set, which has {self.rows} "
                f"training images; set data.global_batch to {self.rows} or less, or add images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.rows // self.global_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """Epoch that optimizer step ``step`` belongs to, both from 0."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """All rows in the order of ``epoch``, the undelivered remainder last.

        Returns:
            int64 permutation of ``range(rows)``; a pure function of (rows, seed, epoch).
        """
        return torch.from_numpy(_order(self.rows, self.seed, epoch).copy())

    def ids(self, step: int) -> Int[Tensor, " g"]:
        """Rows of optimizer step ``step``, over all ranks and micro-batches, int64.

        Raises:
            ValueError: the step is not in ``range(total_steps)``.
        """
        return self._slice(step, 0, self.global_batch)

    def local_ids(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Int[Tensor, " b"]:
        """The share of ``ids(step)`` that one rank takes in one of ``accumulate`` micro-batches.

        Contiguous, by micro-batch and then by rank: the first micro-batch of all ranks together is the
        first part of the global batch.

        Raises:
            UserError: the global batch does not divide evenly.
            ValueError: step, micro or rank out of range.
        """
        share = self.share(world, accumulate)
        if not 0 <= micro < accumulate or not 0 <= rank < world:
            raise ValueError(
                f"micro={micro} of {accumulate}, rank={rank} of {world}: each must be below its count"
            )
        return self._slice(step, (micro * world + rank) * share, share)

    def share(self, world: int, accumulate: int) -> int:
        """Images of one micro-batch on one rank.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        parts = world * accumulate
        if parts < 1:
            raise ValueError(f"world={world}, accumulate={accumulate}: 1 or more is needed of each")
        if self.global_batch % parts:
            below = self.global_batch // parts * parts
            near = f"{below} or {below + parts}" if below else f"{parts}"
            raise UserError(
                f"data.global_batch={self.global_batch} does not divide evenly over {world} ranks x "
                f"{accumulate} accumulated micro-batches; nearest that do: {near}"
            )
        return self.global_batch // parts

    def _slice(self, step: int, start: int, count: int) -> Tensor:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step={step}: the plan has steps 0 to {self.total_steps - 1}")
        start += step % self.steps_per_epoch * self.global_batch
        return torch.from_numpy(
            _order(self.rows, self.seed, self.epoch_of(step))[start : start + count].copy()
        )


# Several epochs are kept: decoding and the miner look ahead over the border of an epoch.
@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows sorted by one random 64-bit word each.

    NumPy promises the raw words of a bit generator for ever, those of ``Generator.permutation`` only
    within a version (NEP 19); so a resume under another NumPy still sees the same order. Equal words
    (about 1e-7 likely at a million rows) fall back on the row number.
    """
    if epoch < 0:
        raise ValueError(f"epoch={epoch}: 0 or more is needed")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order

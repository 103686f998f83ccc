"""The seam between a training step and the loop around it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from contrastive.config import PretrainConfig
from contrastive.distributed import Rows
from contrastive.networks import Networks
from memory_bank.miner import Miner
from memory_bank.negatives import Negatives
from memory_bank.shapes import Float, Int


@dataclass(frozen=True)
class Parts:
    """What a method is built from.

    Attributes:
        config: The run.
        networks: Query network, and key network if the method asks for one.
        miner: The bank and its search.
        labels: Class of each data set row, -1 for unknown; for oracles (``supcon``) alone, else None.
    """

    config: PretrainConfig
    networks: Networks
    miner: Miner
    labels: Int[Tensor, " n"] | None = None


@dataclass
class Outcome:
    """What one micro-batch gave.

    Attributes:
        loss: Mean over this rank's images; carries the gradient.
        diagnostics: Detached scalars, logged as ``train/NAME``. ``effective_negatives`` of 0 in a whole
            optimizer step means that nothing was learnt; leave it out where a method has no negatives.
        keys: Unit rows of *all* ranks' images (``gather_rows``), which the bank stores after the optimizer
            step; None writes nothing.
        query: This rank's queries, detached, for monitors that show what was mined; may be None.
        negatives: What they were pushed away from; may be None.
    """

    loss: Float[Tensor, ""]
    diagnostics: dict[str, Tensor]
    keys: Float[Tensor, "g d"] | None = None
    query: Float[Tensor, "b d"] | None = None
    negatives: Negatives | None = None


class Method(nn.Module, ABC):
    """One training step. Parameters and buffers of its own are trained and saved with the networks'.

    A subclass takes ``Parts`` and writes ``step``. Keep what is in ``Parts`` as attributes of ``parts``
    (which is no submodule), so that no network is registered twice.
    """

    averages_keys: ClassVar[bool] = True
    """Whether the method computes keys with the moving average of the query network."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    @property
    def networks(self) -> Networks:
        """The networks of the run."""
        return self.parts.networks

    @property
    def miner(self) -> Miner:
        """The bank and its search."""
        return self.parts.miner

    @abstractmethod
    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """Compare the views of one micro-batch.

        Collective: every rank calls it, with 2 images or more.

        Args:
            views: Augmented batches: two, then the local ones of multi-crop.
            rows: The images' data set rows, on this rank and on all.
            step: Optimizer step, from 0.
        """


BuildMethod = Callable[[Parts], Method]
"""A method's class, or any function that returns a method."""


def mean_over_pairs(
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    pairs: Sequence[tuple[Tensor, Tensor]],
    negatives: Negatives,
    rows: Rows,
    step: int,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Average ``objective`` over pairs of (query, key) that share their negatives.

    Returns:
        The mean loss, and the diagnostics of the first pair.
    """
    compared = [objective(query, key, negatives, ids=rows.ids, step=step) for query, key in pairs]
    total = torch.stack([loss for loss, _ in compared]).mean() if len(compared) > 1 else compared[0][0]
    return total, compared[0][1]

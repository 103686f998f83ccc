"""The interface between a training step (``Method``) and the training loop (``ContrastiveModule``)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.config import PretrainConfig
from contrastive.distributed import Rows
from contrastive.methods.own_negatives import disturb
from contrastive.networks import Networks
from contrastive.objectives.build import Loss, build_objective
from memory_bank.miner import Miner
from memory_bank.negatives import Negatives


@dataclass(frozen=True)
class Parts:
    """The arguments of a method's constructor.

    Attributes:
        config: The run.
        networks: Query network, and key network if the method asks for one.
        miner: The bank and its search.
        rows: Rows of the data set.
        labels: Class of each data set row, -1 for unknown; None unless its loss ``takes_labels``.
    """

    config: PretrainConfig
    networks: Networks
    miner: Miner
    rows: int
    labels: Int[Tensor, " n"] | None = None


@dataclass
class Outcome:
    """The result of one micro-batch.

    Attributes:
        loss: Mean over this rank's images; carries the gradient.
        diagnostics: Detached scalars, logged as ``train/NAME``. ``effective_negatives`` of 0 in a whole
            optimizer step means that nothing was learnt; omit it if a method has no negatives.
        keys: Unit rows of *all* ranks' images (``gather_rows``), which the bank stores after the optimizer
            step; None writes nothing.
        query: This rank's queries, detached, for monitors that show the mined negatives; may be None.
        negatives: The negatives of these queries; may be None.
    """

    loss: Float[Tensor, ""]
    diagnostics: dict[str, Tensor]
    keys: Float[Tensor, "g d"] | None = None
    query: Float[Tensor, "b d"] | None = None
    negatives: Negatives | None = None


class Method(nn.Module, ABC):
    """Base class of training steps; its own parameters and buffers are trained and saved with the networks'.

    A subclass takes ``Parts`` and implements ``step``. Access networks as ``self.parts.networks`` and do not
    assign them to ``self``: ``parts`` is no submodule, so no network is registered twice.
    """

    averages_keys: ClassVar[bool] = True
    """Whether the method computes keys with the moving average of the query network."""

    mines: ClassVar[bool] = True
    """Whether the negatives come from the bank; ``mining.query=stored`` is refused where they do not."""

    finds_neighbours: ClassVar[bool] = False
    """Whether it calls ``nearest_rows``, which reads the bank."""

    needs_predictor: ClassVar[bool] = False
    """Whether it collapses without one; ``encoder.predictor_hidden=0`` is then refused."""

    takes_own_negatives: ClassVar[bool] = False
    """Whether it asks for ``own_negatives``; ``objective.own_negatives`` is refused where it does not."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Settings of ``objective`` that it reads itself, not by its loss (``objective.gamma``); training warns
    of those that are set and that nothing reads."""

    row_buffers: ClassVar[tuple[str, ...]] = ()
    """Names of its buffers that hold one value for each data set row: where files were added or removed, a
    resume leaves them as they were built, since rows are then other images."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    @property
    def networks(self) -> Networks:
        """Return the networks of the run."""
        return self.parts.networks

    @property
    def miner(self) -> Miner:
        """Return the bank and its search."""
        return self.parts.miner

    def build_loss(self) -> Loss:
        """Build the loss that the config names, for negatives of the bank or (not ``mines``) of the batch."""
        config = self.parts.config
        return build_objective(
            config.objective,
            config.mining,
            in_batch=not self.mines,
            seed=config.run.seed,
            labels=self.parts.labels,
        )

    def nearest_rows(
        self, embedding: Float[Tensor, "b d"], rows: Rows, step: int
    ) -> tuple[Int[Tensor, " b"], Float[Tensor, "b d"]]:
        """Look up the nearest bank row to each embedding, never the image's own. Collective if sharded.

        Returns:
            Its data set row, -1 where the bank has none yet, and its stored key.
        """
        ids = self.miner.nearest(embedding.detach(), rows.ids, step, 1)[0][:, 0]
        bank = self.miner.bank
        return ids, bank.read(bank.slots_of(ids.to(bank.device))).to(embedding.device)

    def take_other(
        self, views: Sequence[Float[Tensor, "b ..."]]
    ) -> tuple[Sequence[Float[Tensor, "b ..."]], Float[Tensor, "b ..."] | None]:
        """Separate the views, or their frames, from the clips that ``own_negatives=clips`` adds last."""
        if self.parts.config.objective.own_negatives == "clips":
            return views[:-1], views[-1]
        return views, None

    def own_negatives(
        self, view: Float[Tensor, "b ..."], other: Float[Tensor, "b ..."] | None, rows: Rows, step: int
    ) -> Float[Tensor, "b d"] | None:
        """Embed the negative that ``objective.own_negatives`` makes of each query's own clip.

        The key network embeds them, without gradient; if there is none, the query network with gradient, as
        it embeds all negatives of such a method. It then takes the frames that were encoded for the queries:
        shuffled or reversed clips have the same ones, so loss and gradients are those of a second pass, and
        running batch statistics move once. Of frozen clips the batch norms of a second pass would see other
        frames. Collective.

        Args:
            view: The view of the queries; without a key network, its frames (``Networks.encode_frames``).
            other: See ``take_other``.
            rows: See ``step``.
            step: See ``step``.

        Returns:
            Unit rows; None if the option is ``none``.
        """
        kind = self.parts.config.objective.own_negatives
        if kind == "none":
            return None
        disturbed = (
            disturb(kind, view, rows.ids, self.parts.config.run.seed, step) if other is None else other
        )
        if self.averages_keys:
            return self.networks.keys(disturbed, rows, step)
        return self.networks.embed_frames(disturbed)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise UserError for a checkpoint that this method cannot continue from; accepts all by default."""

    @abstractmethod
    def step(self, views: Sequence[Float[Tensor, "b ..."]], rows: Rows, step: int) -> Outcome:
        """Compute the loss of one micro-batch.

        Collective: every rank calls it, with 2 images or more.

        Args:
            views: Augmented batches: two global views, then the local ones of multi-crop; for clips see
                ``take_other``.
            rows: The images' data set rows, on this rank and on all.
            step: Optimizer step, from 0.
        """


BuildMethod = Callable[[Parts], Method]
"""A method's class, or any function that returns a method."""


def add_own(negatives: Negatives, own: Float[Tensor, "b d"] | None) -> Negatives:
    """Add the row that ``own_negatives`` made of each query's clip; None adds nothing."""
    return negatives if own is None else negatives.with_own(own[:, None])


def mean_outcome(
    compared: Sequence[tuple[Float[Tensor, ""], dict[str, Tensor]]],
    keys: Float[Tensor, "g d"] | None,
    query: Float[Tensor, "b d"] | None = None,
    negatives: Negatives | None = None,
) -> Outcome:
    """Combine several comparisons: the mean of their losses, the diagnostics of the first."""
    losses = [loss for loss, _ in compared]
    mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
    return Outcome(mean, compared[0][1], keys, query, negatives)

"""Scores during pretraining, from features alone: the offline protocols' own code on held-out rows."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import UserError
from eval.config import LinearConfig
from eval.features import Split
from eval.knn import knn_votes
from eval.linear_probe import choose, fit


@dataclass(frozen=True)
class OnlineKnn:
    """kNN top-1 of held-out rows; equals ``contrastive-eval knn`` on the same features.

    Attributes:
        k: Neighbours; all of them where there are fewer rows, since a monitor must not stop a run.
        temperature: See ``eval.config.KnnConfig``.
    """

    k: int = 20
    temperature: float = 0.07

    def __call__(
        self,
        train: Float[Tensor, "n d"],
        train_labels: Int[Tensor, " n"],
        test: Float[Tensor, "m d"],
        test_labels: Int[Tensor, " m"],
    ) -> float:
        """Share of ``test`` whose class wins the vote, in [0, 1]; NaN where a row is not finite."""
        num_classes = int(train_labels.max()) + 1
        ks = [min(self.k, len(train))]
        try:
            votes = knn_votes(train, train_labels, test, num_classes, ks=ks, temperature=self.temperature)
        except UserError:  # a monitor must not stop a run
            return math.nan
        return float((votes[0].argmax(1) == test_labels).double().mean())


@dataclass(frozen=True)
class OnlineProbe:
    """Linear-probe top-1 of held-out rows; equals ``contrastive-eval linear`` on the same features.

    Attributes:
        config: The grid; its best pair is chosen inside the rows to fit on, as offline. A smaller one was
            tried: it is off by 1 to 2 points, and the whole one costs seconds.
    """

    config: LinearConfig = field(default_factory=LinearConfig)

    def __call__(
        self,
        train: Float[Tensor, "n d"],
        train_labels: Int[Tensor, " n"],
        test: Float[Tensor, "m d"],
        test_labels: Int[Tensor, " m"],
    ) -> float:
        """Share of ``test`` that is classified rightly.

        NaN where no class of ``train`` has two rows, or a row is not finite.
        """
        split = Split(train, train_labels, torch.arange(len(train), device=train.device))
        num_classes = int(train_labels.max()) + 1
        try:
            choice = choose(split, num_classes, self.config, 0)
            predicted = fit(split, num_classes, self.config, choice, 0)(test).argmax(1)
        except UserError:  # a monitor must not stop a run
            return math.nan
        return float((predicted == test_labels).double().mean())

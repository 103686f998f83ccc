"""Scores during pretraining, from features alone: the offline protocols' own code on held-out rows."""

from dataclasses import dataclass

from torch import Tensor

from eval.knn import knn_votes
from memory_bank.shapes import Float, Int


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
        """Share of ``test`` whose class wins the vote, in [0, 1]."""
        num_classes = int(train_labels.max()) + 1
        ks = [min(self.k, len(train))]
        votes = knn_votes(train, train_labels, test, num_classes, ks=ks, temperature=self.temperature)
        return float((votes[0].argmax(1) == test_labels).double().mean())

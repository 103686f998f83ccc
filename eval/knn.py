"""Classify by a weighted vote of the nearest neighbours, found by the memory bank's exact search."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import UserError
from eval.config import EvalConfig
from eval.features import Features
from eval.finite import finite_float32
from eval.protocol import Scoring
from eval.scores import Scored, accuracy_line, confusion, per_class
from memory_bank.config import check_above_zero, check_range
from memory_bank.retrieval.exact import Exact
from memory_bank.storage import DatasetBank

# Queries looked up at once.
_BATCH = 1024


@dataclass
class KnnConfig:
    """Settings of the weighted nearest-neighbour vote (InstDisc, arXiv:1805.01978, section 3.4).

    Attributes:
        k: Number of neighbours that vote; each value is scored, the first is the headline. A value above the
            number of training images is left out, with a warning.
        temperature: A neighbour votes with exp(cosine / temperature).
    """

    k: list[int] = field(default_factory=lambda: [20, 200])
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"knn.k={self.k}: one or more numbers of neighbours are needed, each 1 or more")
        check_above_zero("knn.temperature", self.temperature, "; 0.07 is usual")
        check_range("knn.temperature", self.temperature, 1e-6)  # float32 has few numbers below


@dataclass
class KnnEvaluation(EvalConfig):
    """Settings of the ``knn`` protocol.

    Attributes:
        knn: See KnnConfig.
    """

    knn: KnnConfig = field(default_factory=KnnConfig)


def score(features: Features, config: KnnEvaluation) -> Scored:
    """Return top-1 for each ``knn.k``, the headline first; nothing is trained or chosen.

    A k above the number of training rows is left out, with a warning.

    Raises:
        UserError: no k is left.
    """
    train, test = features.train, features.test
    ks = [k for k in config.knn.k if k <= len(train)]
    few = f"the training part has {len(train)} readable images"
    if not ks:
        raise UserError(f"knn.k={min(config.knn.k)}: {few}; set knn.k=[{min(20, len(train))}] or smaller")
    warnings = [f"knn.k={k}: left out, {few}" for k in config.knn.k if k not in ks]
    votes = knn_votes(
        train.features,
        train.labels,
        test.features,
        len(features.classes),
        ks=ks,
        temperature=config.knn.temperature,
    )
    predicted = votes.argmax(2)
    lines = [
        accuracy_line(f"top1 k={k}", hits[None]) for k, hits in zip(ks, predicted == test.labels, strict=True)
    ]
    counts = confusion(predicted[0], test.labels, len(features.classes))
    details = {"per_class": per_class(counts, features.classes), "confusion": counts.tolist()}
    return Scored(lines, details, warnings)


PROTOCOL = Scoring(KnnEvaluation, score, title="Nearest neighbours")


def knn_votes(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    num_classes: int,
    *,
    ks: list[int],
    temperature: float,
) -> Float[Tensor, "j m c"]:
    """Return votes for each class: sums of exp(cosine / temperature) over the k nearest rows of that class.

    InstDisc section 3.4 (arXiv:1805.01978), as DINO evaluates.

    Args:
        train: Rows to search, of any norm and float dtype; computed in float32.
        labels: Their classes in [0, num_classes).
        test: Queries, of any norm and float dtype.
        num_classes: c.
        ks: The j numbers of neighbours; at most n.
        temperature: Above 0.

    Returns:
        Votes, scaled so that the nearest row's is 1: then no temperature makes all of them 0 or one overflow.

    Raises:
        ValueError: a k outside [1, n].
        UserError: a row is not finite.
    """
    if not 1 <= min(ks) <= max(ks) <= len(train):
        raise ValueError(f"ks={ks}: allowed are 1 to {len(train)}, the rows to search")
    train, test = finite_float32(train, "train"), finite_float32(test, "test")
    bank = DatasetBank.of(F.normalize(train))
    search, admissible = Exact(bank), bank.admissible(0)
    parts = []
    for query in torch.split(F.normalize(test), _BATCH):
        outside = labels.new_full((len(query),), -1)  # a query is no row of the bank
        nearest = search.search(query, outside, max(ks), admissible=admissible)
        weight = ((nearest.similarity - nearest.similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(ks), len(query), num_classes)
        for vote, k in zip(votes, ks, strict=True):
            vote.scatter_add_(1, labels[nearest.slots[:, :k]], weight[:, :k])
        parts.append(votes)
    return torch.cat(parts, dim=1)

"""Train linear probes from few labels: nested stratified draws, several seeds, one rule fixed in advance."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive.config import UserError
from eval.config import FLOAT32_MAX, SeededEvaluation
from eval.features import Features, PartFeatures
from eval.finite import finite_float32
from eval.protocol import Scoring
from eval.scores import Scored, accuracy_line
from eval.softmax import Standardiser, train_classifiers
from eval.splits import class_orders
from memory_bank.config import check_above_zero, check_range

_LEARNING_RATE = 0.1
_STEPS, _EPOCHS, _BATCH_SIZE = 200, 25, 4096


@dataclass
class LowshotConfig:
    """Settings of probes from few labels; the rule is fixed in advance and nothing is chosen by a score.

    Attributes:
        labels_per_class: Labelled images of each class.
        fractions: Shares of each class's training images, at least one image each.
        weight_decay: ``weight_decay / sqrt(labels)`` is the decay of a probe from that many labels.
    """

    labels_per_class: list[int] = field(default_factory=lambda: [1, 5, 10])
    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        if not self.labels_per_class + self.fractions:
            raise ValueError(
                "lowshot.labels_per_class and lowshot.fractions are both empty; give one level or more"
            )
        for count in self.labels_per_class:
            check_range("lowshot.labels_per_class", count, 1)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"lowshot.fractions={self.fractions}: allowed are shares above 0, up to 1")
        check_above_zero("lowshot.weight_decay", self.weight_decay)
        check_range("lowshot.weight_decay", self.weight_decay, 0, FLOAT32_MAX)


@dataclass
class LowshotEvaluation(SeededEvaluation):
    """Settings of the ``lowshot`` protocol.

    Attributes:
        lowshot: See LowshotConfig.
    """

    lowshot: LowshotConfig = field(default_factory=LowshotConfig)


def score(features: Features, config: LowshotEvaluation) -> Scored:
    """Return top-1 at each level: the mean over seeds; at 100% there is only one draw, so one run.

    Features are standardised by all training images: labels are scarce, images are not.

    Raises:
        UserError: a class has fewer images than the labels asked for.
    """
    train = features.train
    standardise = Standardiser.fit(train.features)
    train = PartFeatures(standardise(train.features), train.labels, train.rows)
    test = standardise(finite_float32(features.test.features, "test features"))
    lines, details = [], []
    for name, draws in draw_levels(train.labels, features.classes, config.lowshot, config.seeds):
        predicted = [
            _predict(train.take(rows), test, len(features.classes), config.lowshot) for rows in draws
        ]
        hits = torch.stack([each == features.test.labels for each in predicted])
        lines.append(accuracy_line(f"top1 at {name}", hits))
        level: dict[str, Any] = {
            "level": name,
            "labels": len(draws[0]),
            "per_seed": hits.double().mean(1).tolist(),
            "weight_decay": weight_decay(len(draws[0]), config.lowshot),
        }
        details.append(level)
    return Scored(lines, {"levels": details})


PROTOCOL = Scoring(LowshotEvaluation, score, title="Few labels")


def draw_levels(
    labels: Int[Tensor, " n"], classes: tuple[str, ...], config: LowshotConfig, seeds: int
) -> list[tuple[str, list[Int[Tensor, "..."]]]]:
    """Draw the labelled rows for each level and seed; the levels of one seed are nested.

    Of levels with the same counts only the first is kept: 1% of a small data set is 1 a class.

    Raises:
        UserError: a class has fewer images than the labels asked for.
    """
    orders = [class_orders(labels, seed) for seed in range(seeds)]
    sizes = [len(order) for order in orders[0]]
    most, least = max(config.labels_per_class, default=0), min(sizes)
    if most > least:
        name = classes[int(labels[orders[0][sizes.index(least)][0]])]
        allowed = [count for count in config.labels_per_class if count <= least]
        raise UserError(
            f"lowshot.labels_per_class={config.labels_per_class}: class {name!r} has {least} training "
            f"images; set lowshot.labels_per_class={str(allowed).replace(' ', '')}"
        )
    levels = [(f"{count} a class", [count] * len(sizes)) for count in config.labels_per_class]
    levels += [
        (f"{share:.4g}%", _shares(share / 100, sizes)) for share in (100 * f for f in config.fractions)
    ]
    names: dict[tuple[int, ...], str] = {}
    for name, counts in levels:
        names.setdefault(tuple(counts), name)
    return [(name, _draws(orders, list(counts), sizes, labels)) for counts, name in names.items()]


def weight_decay(num_labels: int, config: LowshotConfig) -> float:
    """Return the weight decay by the rule ``config.weight_decay / sqrt(num_labels)``.

    This is the usual scaling of a ridge penalty with sample size. The constant of 0.2 was fixed once, on raw
    pixels and random features (no trained encoder) of random splits of digits and of CIFAR-10: from 10 to
    5,000 labels it was within 4 points of the best decay for each, mostly within 1.
    """
    return config.weight_decay / math.sqrt(num_labels)


def _shares(share: float, sizes: list[int]) -> list[int]:
    return [max(1, round(share * size)) for size in sizes]


def _draws(orders: list[list[Tensor]], counts: list[int], sizes: list[int], labels: Tensor) -> list[Tensor]:
    """Return one draw for each seed, or a single one if it takes all rows."""
    used = orders[:1] if counts == sizes else orders
    return [
        torch.cat([order[:count] for order, count in zip(each, counts, strict=True)])
        .sort()
        .values.to(labels.device)
        for each in used
    ]


def _predict(train: PartFeatures, test: Tensor, num_classes: int, config: LowshotConfig) -> Tensor:
    classifiers = train_classifiers(
        train.features,
        train.labels,
        num_classes,
        learning_rates=train.features.new_tensor([_LEARNING_RATE]),
        weight_decays=train.features.new_tensor([weight_decay(len(train), config)]),
        steps=max(_STEPS, _EPOCHS * (len(train) // _BATCH_SIZE)),
        batch_size=_BATCH_SIZE,
    )
    return classifiers.logits(test)[:, :, 0].argmax(1)

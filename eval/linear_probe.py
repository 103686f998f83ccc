"""Train a grid of linear probes at once, choose one on a part of train, refit it, score it once on test."""

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError
from eval.config import SeededEvaluation, check_grid
from eval.features import Features, PartFeatures
from eval.finite import finite_float32
from eval.protocol import Scoring
from eval.scores import Scored, accuracy_line, confusion, in_top, per_class
from eval.softmax import STABLE_RATE, LinearClassifiers, Standardiser, train_classifiers
from eval.splits import hold_out
from memory_bank.config import check_whole

# Largest number of logits in memory when classifiers are scored.
_PIECE = 1 << 26
_MOST_ADDED = 20  # values at an end of a list: 20 powers of ten are far beyond any probe


@dataclass
class LinearConfig:
    """Settings of the linear probe: a classifier for each pair of rate and decay, all trained at once.

    Attributes:
        learning_rates: Peak steps, relative to the curvature bound of ``eval.softmax``; with its momentum of
            0.9, 0.1 adds up to one full step. Above 3.8 a classifier may diverge, so the list grows up to it.
        weight_decays: w in ``mean cross-entropy + w / 2 * |weights|^2``; scikit-learn's C is 1 / (w n),
            for two classes 2 / (w n): it fits one weight vector there, the difference of our two.
        widen: Most values that each of the two lists grows by at either end, one at a time and in its own
            ratio, while the best value is the last there; a list of one stays. Of the encoder and of its
            baselines alike. From 0 to 20.
        held_out: Share of each class of *train* on which the pair is chosen.
        batch_size: Rows of a step; fewer rows are one batch.
        epochs: Passes over the rows, unless ``min_steps`` is more.
        min_steps: Smallest number of steps. It also regularises: 200 leave the objective above its minimum,
            by 10% at w = 1e-3 and 3.2 times at 1e-6. The minimum itself scores +0.31 +- 0.15, -1.01 +- 0.45
            and -0.21 +- 0.50 points (standard errors) over ten splits of three sets: within chance
            (benchmarks/probe_steps.py).
    """

    learning_rates: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0])
    weight_decays: list[float] = field(
        default_factory=lambda: [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1]
    )
    widen: int = 3
    held_out: float = 0.15
    batch_size: int = 4096
    epochs: int = 25
    min_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("learning_rates", "weight_decays"):
            check_grid(f"linear.{name}", getattr(self, name))
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear.held_out={self.held_out}: allowed is above 0 and below 1")
        check_whole("linear.widen", self.widen, 0, _MOST_ADDED)
        for name in ("batch_size", "epochs", "min_steps"):
            check_whole(f"linear.{name}", getattr(self, name), 1)


@dataclass
class LinearEvaluation(SeededEvaluation):
    """Settings of the ``linear`` protocol.

    Attributes:
        linear: See LinearConfig.
    """

    linear: LinearConfig = field(default_factory=LinearConfig)


@dataclass(frozen=True)
class Choice:
    """The setting that scored best on the held-out part of train.

    Attributes:
        learning_rate: Best learning rate of the grid.
        weight_decay: Best weight decay of the grid.
        held_out_top1: Its accuracy there.
        learning_rates: Those of the grid; more than the setting lists if it was widened.
        weight_decays: Those of the grid, as for learning rates.
        edges: Names of the settings whose chosen value is the first or last of its list.
    """

    learning_rate: float
    weight_decay: float
    held_out_top1: float
    learning_rates: list[float]
    weight_decays: list[float]
    edges: tuple[str, ...]


def score(features: Features, config: LinearEvaluation) -> Scored:
    """Return top-1 and, above 5 classes, top-5; the details have class accuracies and confusion."""
    num_classes, train = len(features.classes), features.train
    choices = [choose(train, num_classes, config.linear, seed) for seed in range(config.seeds)]
    probes = [fit(train, num_classes, config.linear, choice, seed) for seed, choice in enumerate(choices)]
    logits = torch.stack([probe(features.test.features) for probe in probes])
    return summarise(logits, features, choices, "linear")


PROTOCOL = Scoring(LinearEvaluation, score, title="Linear probe")


def summarise(
    logits: Float[Tensor, "r n c"], features: Features, choices: list[Choice], group: str
) -> Scored:
    """Score the logits of a linear probe.

    Args:
        logits: Logits of the test images, for each seed; details are of the first.
        features: Features with the test labels and the classes.
        choices: The chosen setting, for each seed.
        group: Where the settings that were chosen are in the config, e.g. ``linear``.
    """
    classes, test = features.classes, features.test
    lines = [
        accuracy_line(f"top{k}", torch.stack([in_top(each, test.labels, k) for each in logits]))
        for k in (1, 5)
        if k == 1 or len(classes) > k
    ]
    counts = confusion(logits[0].argmax(1), test.labels, len(classes))
    details: dict[str, Any] = {
        "per_seed": [float(in_top(each, test.labels, 1).double().mean()) for each in logits],
        "chosen": [vars(choice) for choice in choices],
        "per_class": per_class(counts, classes),
        "confusion": counts.tolist(),
    }
    return Scored(lines, details, edge_warnings(choices, group))


def choose(train: PartFeatures, num_classes: int, config: LinearConfig, seed: int) -> Choice:
    """Train the whole grid on one part of ``train``, take the best on the other; widen it as ``widen`` says.

    Raises:
        UserError: too few rows to hold some out, or every setting diverged.
    """
    fit_part, held = split_to_choose(train, config.held_out, seed)
    rates, decays = config.learning_rates, config.weight_decays
    tried: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}
    while True:
        new = [pair for pair in product(rates, decays) if pair not in tried]
        classifiers, standardise = _train(fit_part, num_classes, config, new, seed)
        seen = score_classifiers(classifiers, replace(held, features=standardise(held.features)))
        tried |= zip(new, zip(*seen, strict=True), strict=True)
        top1, loss = zip(*(tried[pair] for pair in product(rates, decays)), strict=True)
        choice = pick(torch.stack(top1), torch.stack(loss), rates, decays)
        rates = _widened(rates, choice.learning_rate, config.learning_rates, config.widen, STABLE_RATE)
        decays = _widened(decays, choice.weight_decay, config.weight_decays, config.widen, math.inf)
        if (rates, decays) == (choice.learning_rates, choice.weight_decays):
            return _without_stable_end(choice)


def _without_stable_end(choice: Choice) -> Choice:
    """Count the last learning rate as no edge where the next one would not be stable."""
    rates = choice.learning_rates
    if len(rates) < 2 or choice.learning_rate != rates[-1] or _beyond(rates[-2], rates[-1], STABLE_RATE):
        return choice
    return replace(choice, edges=tuple(name for name in choice.edges if name != "learning_rates"))


def _widened(values: list[float], best: float, given: list[float], most: int, limit: float) -> list[float]:
    """Add a value beyond ``best`` if that is at an end of the list where fewer than ``most`` were added."""
    if len(values) > 1 and best == values[0] and values.index(given[0]) < most:
        return [*_beyond(values[1], best, limit), *values]
    if len(values) > 1 and best == values[-1] and values[::-1].index(given[-1]) < most:
        return [*values, *_beyond(values[-2], best, limit)]
    return values


def _beyond(before: float, last: float, limit: float) -> list[float]:
    """Return the next value of a geometric series, to three digits; none above ``limit`` or float32's."""
    value, numbers = float(f"{last * (last / before):.3g}"), torch.finfo(torch.float32)
    return [value] if numbers.tiny <= value <= min(limit, numbers.max) else []


def split_to_choose(train: PartFeatures, share: float, seed: int) -> tuple[PartFeatures, PartFeatures]:
    """Split ``train`` into rows to fit on, and ``share`` of each class to choose settings by.

    Raises:
        UserError: no class has two images.
    """
    fit_rows, held_rows = hold_out(train.labels, share, seed)
    if not len(held_rows):
        raise UserError(
            f"the training part has {len(train)} labelled images, one a class; choosing settings "
            "needs 2 or more of a class; use the lowshot or knn protocol"
        )
    return train.take(fit_rows), train.take(held_rows)


def pick(
    top1: Float[Tensor, " h"],
    loss: Float[Tensor, " h"],
    learning_rates: list[float],
    weight_decays: list[float],
) -> Choice:
    """Return the best setting; there is one for each pair of rate and decay.

    Ties in accuracy are broken in favour of values inside the grid, then by the lower cross-entropy.

    Args:
        top1: Accuracy of each setting on held-out rows; 0 if it diverged.
        loss: Cross-entropy on those rows; infinite if it diverged.
        learning_rates: Learning rates of the grid.
        weight_decays: Weight decays of the grid; they vary faster.

    Raises:
        UserError: every setting diverged.
    """
    if not loss.isfinite().any():
        raise UserError(f"learning_rates={learning_rates}: every setting diverged; allow lower ones")
    width = len(weight_decays)
    best = min(
        range(len(top1)),
        key=lambda setting: (
            -top1[setting].item(),
            _on_edge(setting // width, learning_rates) or _on_edge(setting % width, weight_decays),
            loss[setting].item(),
        ),
    )
    # Values are taken from the lists: those in the tensors are rounded to float32.
    rate, decay = divmod(best, width)
    edges = (("learning_rates", rate, learning_rates), ("weight_decays", decay, weight_decays))
    return Choice(
        learning_rates[rate],
        weight_decays[decay],
        top1[best].item(),
        learning_rates,
        weight_decays,
        tuple(name for name, index, values in edges if _on_edge(index, values)),
    )


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier on top of raw features."""

    standardise: Standardiser
    classifiers: LinearClassifiers

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the logits.

        Raises:
            UserError: a row is not finite.
        """
        return self.classifiers.logits(self.standardise(finite_float32(features)))[:, :, 0]


def fit(train: PartFeatures, num_classes: int, config: LinearConfig, choice: Choice, seed: int) -> Probe:
    """Train the chosen setting on all of ``train``."""
    classifiers, standardise = _train(
        train, num_classes, config, [(choice.learning_rate, choice.weight_decay)], seed
    )
    return Probe(standardise, classifiers)


def _train(
    train: PartFeatures, num_classes: int, config: LinearConfig, pairs: list[tuple[float, float]], seed: int
) -> tuple[LinearClassifiers, Standardiser]:
    """Train a classifier for each pair of learning rate and weight decay."""
    standardise = Standardiser.fit(train.features)
    rates, decays = torch.tensor(pairs, device=train.features.device).T.contiguous()
    classifiers = train_classifiers(
        standardise(train.features),
        train.labels,
        num_classes,
        learning_rates=rates,
        weight_decays=decays,
        steps=max(config.min_steps, config.epochs * (len(train) // config.batch_size)),
        batch_size=config.batch_size,
        seed=seed,
    )
    return classifiers, standardise


def score_classifiers(
    classifiers: LinearClassifiers, part: PartFeatures
) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
    """Return accuracy and cross-entropy of each classifier on standardised rows; 0, infinity if diverged."""
    features, labels = part.features, part.labels
    hits, cost = torch.zeros_like(classifiers.bias[0]), torch.zeros_like(classifiers.bias[0])
    step = max(1, _PIECE // classifiers.bias.numel())
    for rows, truth in zip(torch.split(features, step), torch.split(labels, step), strict=True):
        logits = classifiers.logits(rows)
        hits += (logits.argmax(1) == truth[:, None]).sum(0)
        cost += F.cross_entropy(logits, truth[:, None].expand(-1, logits.shape[2]), reduction="none").sum(0)
    sound = cost.isfinite()
    return torch.where(sound, hits, 0.0) / len(labels), torch.where(sound, cost, torch.inf) / len(labels)


def _on_edge(index: int, grid: list[float]) -> bool:
    """Return whether ``index`` is the first or last of the list; a list of one has no edge."""
    return len(grid) > 1 and index in (0, len(grid) - 1)


def edge_warnings(choices: list[Choice], group: str) -> list[str]:
    """Warn if the best value was the first or last of its list; ``group`` is as in ``summarise``."""
    warnings = []
    for kind in ("learning_rates", "weight_decays"):
        for choice in [choice for choice in choices if kind in choice.edges][:1]:
            best, values = getattr(choice, kind.removesuffix("s")), getattr(choice, kind)
            warnings.append(
                f"{group}.{kind}: the best value, {best:g}, is on the edge of {values}; "
                "a wider grid may score higher"
            )
    return warnings

"""Linear probe: a grid of settings trained at once, chosen inside train, refitted, scored once on test."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError
from eval.config import EvalConfig, LinearConfig
from eval.features import Features, Split
from eval.finite import finite_float32
from eval.scores import Scored, confusion, in_top, line, per_class
from eval.softmax import Heads, Standardiser, train_heads
from eval.splits import hold_out

# Logits held at once when heads are scored.
_PIECE = 1 << 26


@dataclass(frozen=True)
class Choice:
    """The setting that did best on the held-out part of train.

    Attributes:
        learning_rate: Of the grid.
        weight_decay: Of the grid.
        held_out_top1: Its accuracy there.
        edges: Names of the settings whose chosen value is the first or last of its list.
    """

    learning_rate: float
    weight_decay: float
    held_out_top1: float
    edges: tuple[str, ...]


def score(features: Features, config: EvalConfig) -> Scored:
    """Top-1 and, above 5 classes, top-5; per class and confusion of the first seed in the details."""
    num_classes, train = len(features.classes), features.train
    choices = [choose(train, num_classes, config.linear, seed) for seed in range(config.seeds)]
    probes = [fit(train, num_classes, config.linear, choice, seed) for seed, choice in enumerate(choices)]
    logits = torch.stack([probe(features.test.features) for probe in probes])
    grid = {
        "linear.learning_rates": config.linear.learning_rates,
        "linear.weight_decays": config.linear.weight_decays,
    }
    return summarise(logits, features, choices, grid)


def summarise(
    logits: Float[Tensor, "r n c"], features: Features, choices: list[Choice], grid: dict[str, list[float]]
) -> Scored:
    """What a linear probe says.

    Args:
        logits: Of the test images, for each seed.
        features: Give the test labels and the classes.
        choices: Of each seed.
        grid: The settings that were chosen from, by their names in the config.
    """
    classes, test = features.classes, features.test
    lines = [
        line(f"top{k}", torch.stack([in_top(each, test.labels, k) for each in logits]))
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
    return Scored(lines, details, edge_warnings(choices, grid))


def choose(train: Split, num_classes: int, config: LinearConfig, seed: int) -> Choice:
    """Train the whole grid on one part of ``train``, take the best on the other.

    Raises:
        UserError: too few rows to hold some out, or every setting diverged.
    """
    fit_part, held = split_to_choose(train, config.held_out, seed)
    rates, decays = _grid(config, train.features.device)
    heads, standardise = _train(fit_part, num_classes, config, rates, decays, seed)
    held = replace(held, features=standardise(held.features))
    return pick(*score_heads(heads, held), config.learning_rates, config.weight_decays)


def split_to_choose(train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """A part of ``train`` to fit on, and ``share`` of each class to choose settings by.

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
    """The best of the settings, one for each pair of rate and decay.

    Equal accuracies are settled for values inside the grid, then by the lower cross-entropy.

    Args:
        top1: Accuracy on rows that it was not trained on; 0 for a diverged one.
        loss: Cross-entropy there; infinite for a diverged one.
        learning_rates: Of the grid.
        weight_decays: Of the grid; they vary faster.

    Raises:
        UserError: every setting diverged.
    """
    if not loss.isfinite().any():
        raise UserError(f"learning_rates={learning_rates}: every setting diverged; allow lower ones")
    width = len(weight_decays)
    best = min(
        range(len(top1)),
        key=lambda head: (
            -top1[head].item(),
            _on_edge(head // width, learning_rates) or _on_edge(head % width, weight_decays),
            loss[head].item(),
        ),
    )
    # Places in the lists, not values of the tensors: those are rounded to float32.
    rate, decay = divmod(best, width)
    edges = (("learning_rates", rate, learning_rates), ("weight_decays", decay, weight_decays))
    return Choice(
        learning_rates[rate],
        weight_decays[decay],
        top1[best].item(),
        tuple(name for name, place, values in edges if _on_edge(place, values)),
    )


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier on top of raw features."""

    standardise: Standardiser
    heads: Heads

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Logits.

        Raises:
            UserError: a row is not finite.
        """
        return self.heads.logits(self.standardise(finite_float32(features)))[:, :, 0]


def fit(train: Split, num_classes: int, config: LinearConfig, choice: Choice, seed: int) -> Probe:
    """Train the chosen setting on all of ``train``."""
    rate, decay = (
        torch.tensor([value], device=train.features.device)
        for value in (choice.learning_rate, choice.weight_decay)
    )
    heads, standardise = _train(train, num_classes, config, rate, decay, seed)
    return Probe(standardise, heads)


def _train(
    train: Split, num_classes: int, config: LinearConfig, rates: Tensor, decays: Tensor, seed: int
) -> tuple[Heads, Standardiser]:
    standardise = Standardiser.fit(train.features)
    heads = train_heads(
        standardise(train.features),
        train.labels,
        num_classes,
        learning_rates=rates,
        weight_decays=decays,
        steps=max(config.min_steps, config.epochs * (len(train) // config.batch_size)),
        batch_size=config.batch_size,
        seed=seed,
    )
    return heads, standardise


def _grid(config: LinearConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every pair of learning rate and weight decay, one a head."""
    pairs = torch.cartesian_prod(
        torch.tensor(config.learning_rates, device=device), torch.tensor(config.weight_decays, device=device)
    )
    rates, decays = pairs.unbind(1)
    return rates.contiguous(), decays.contiguous()


def score_heads(heads: Heads, split: Split) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
    """Accuracy and cross-entropy of each head on standardised rows; a diverged one scores 0 and infinity."""
    features, labels = split.features, split.labels
    hits, cost = torch.zeros_like(heads.bias[0]), torch.zeros_like(heads.bias[0])
    step = max(1, _PIECE // heads.bias.numel())
    for rows, truth in zip(torch.split(features, step), torch.split(labels, step), strict=True):
        logits = heads.logits(rows)
        hits += (logits.argmax(1) == truth[:, None]).sum(0)
        cost += F.cross_entropy(logits, truth[:, None].expand(-1, logits.shape[2]), reduction="none").sum(0)
    sound = cost.isfinite()
    return torch.where(sound, hits, 0.0) / len(labels), torch.where(sound, cost, torch.inf) / len(labels)


def _on_edge(place: int, grid: list[float]) -> bool:
    """Whether ``place`` is the first or last of its list; a list of one has no edge."""
    return len(grid) > 1 and place in (0, len(grid) - 1)


def edge_warnings(choices: list[Choice], grid: dict[str, list[float]]) -> list[str]:
    """What to know where the best value was the first or last of its list; ``grid`` as of ``summarise``."""
    found = []
    for name, values in grid.items():
        kind = name.rpartition(".")[2]
        chosen = [getattr(choice, kind.removesuffix("s")) for choice in choices if kind in choice.edges]
        if chosen:
            found.append(
                f"{name}: the best value, {chosen[0]:g}, is on the edge of {values}; "
                "a wider grid may score higher"
            )
    return found

"""Measure whether the linear probe's step count regularises: the probe as shipped beside its minimum.

The minimum of the objective is found by scikit-learn's L-BFGS over the same weight decays, chosen on the same
held-out rows of train and refitted on all of train. Ten random splits of three sets, with three quarters to
train on:

    python benchmarks/probe_steps.py

No files are needed: the sets are scikit-learn's, and a small random encoder's features of its digits.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, context, write
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from contrastive.config import EncoderConfig
from contrastive.encoders.build import build_encoder
from eval.features import Features, PartFeatures
from eval.linear_probe import LinearEvaluation, score
from eval.softmax import Standardiser
from eval.splits import class_orders, hold_out

MAX_ITER = 5000


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def encoded() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = pixels()
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet10", width=8), 8).eval()
    with torch.no_grad():
        return encoder((x / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)), y


def tumours() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


SETS: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
    "digits, pixels": pixels,
    "digits, random encoder": encoded,
    "breast cancer": tumours,
}


def part(x: torch.Tensor, y: torch.Tensor, seed: int) -> Features:
    """Return a random split with three quarters of each class to train on."""
    orders = [
        order.split([3 * len(order) // 4, len(order) - 3 * len(order) // 4])
        for order in class_orders(y, seed)
    ]
    train, test = (torch.cat(rows) for rows in zip(*orders, strict=True))
    return Features(
        PartFeatures(x[train], y[train], train),
        PartFeatures(x[test], y[test], test),
        tuple(map(str, range(int(y.max()) + 1))),
    )


def converged(features: Features, config: LinearEvaluation) -> tuple[float, int]:
    """Return the accuracy on test, and the number of solves that did not converge."""
    train, test, classes = features.train, features.test, len(features.classes)

    def solve(rows: torch.Tensor, decay: float) -> Callable[[PartFeatures], float]:
        standardise = Standardiser.fit(train.features[rows])
        scale = (
            2 if classes == 2 else 1
        )  # of two classes scikit-learn fits one weight vector, their difference
        model = LogisticRegression(C=scale / (decay * len(rows)), max_iter=MAX_ITER, tol=1e-5)
        nonlocal unsolved
        model.fit(standardise(train.features[rows]).double().numpy(), train.labels[rows].numpy())
        unsolved += int(model.n_iter_.max() >= MAX_ITER)
        return lambda split: float(
            model.score(standardise(split.features).double().numpy(), split.labels.numpy())
        )

    unsolved = 0
    fit, held = hold_out(train.labels, config.linear.held_out, 0)
    decays = config.linear.weight_decays
    best = max(decays, key=lambda decay: solve(fit, decay)(train.take(held)))
    return solve(torch.arange(len(train)), best)(test), unsolved


def compare(name: str, splits: int) -> dict[str, Any]:
    x, y = SETS[name]()
    config = LinearEvaluation(checkpoint="-")
    found, unsolved = [], 0
    for seed in range(splits):
        features = part(x, y, seed)
        minimum, failed = converged(features, config)
        found.append([100 * score(features, config).lines[0].value, 100 * minimum])
        unsolved += failed
        print(name, seed, *(f"{value:.2f}" for value in found[-1]), f"{failed} unsolved", flush=True)
    shipped, solved = np.array(found).T
    apart = solved - shipped
    return {
        "shape": [*x.shape],
        "as_shipped": shipped.tolist(),
        "converged": solved.tolist(),
        "unsolved": unsolved,
        "converged_minus_shipped": float(apart.mean()),
        "standard_error": float(apart.std(ddof=1) / math.sqrt(splits)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_steps.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    sets = {name: compare(name, options.splits) for name in SETS}
    for name, found in sets.items():
        print(
            f"{name}: converged {found['converged_minus_shipped']:+.2f} "
            f"+- {found['standard_error']:.2f} points against as shipped"
        )
    about = context("probe_steps", torch.device("cpu"), ("torch", "scikit-learn", "numpy"))
    write(options.out, about | {"splits": options.splits, "sets": sets})


if __name__ == "__main__":
    main()

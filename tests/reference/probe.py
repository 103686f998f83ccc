"""Recompute evaluations by plain NumPy loops, from the papers."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def knn_predict(
    train: Array, labels: NDArray[np.int64], test: Array, k: int, temperature: float
) -> list[int]:
    """Compute the weighted vote of InstDisc section 3.4 (arXiv:1805.01978)."""
    predicted = []
    for query in test:
        similar = []
        for row, label in zip(train, labels, strict=True):
            cosine = float(query @ row / np.sqrt(query @ query) / np.sqrt(row @ row))
            similar.append((cosine, int(label)))
        similar.sort(key=lambda pair: -pair[0])
        votes: dict[int, float] = {}
        for cosine, label in similar[:k]:
            votes[label] = votes.get(label, 0.0) + np.exp(cosine / temperature)
        predicted.append(max(votes, key=lambda label: votes[label]))
    return predicted


def rankme(features: Array) -> float:
    """Compute the effective rank of Garrido et al. 2023 (arXiv:2210.02885), equations 2 and 3."""
    values = np.sqrt(np.clip(np.linalg.eigvalsh(features.T @ features), 0, None))
    entropy = 0.0
    for value in values:
        p = value / values.sum() + 1e-7
        entropy -= p * np.log(p)
    return float(np.exp(entropy))


def alignment(first: Array, second: Array) -> float:
    """Compute the alignment of Wang & Isola 2020 (arXiv:2005.10242), alpha = 2."""
    return float(np.mean([np.sum((a - b) ** 2) for a, b in zip(first, second, strict=True)]))


def uniformity(unit: Array) -> float:
    """Compute the uniformity of Wang & Isola 2020 (arXiv:2005.10242), t = 2, over unordered pairs."""
    potentials = [
        np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2))
        for i in range(len(unit))
        for j in range(i + 1, len(unit))
    ]
    return float(np.log(np.mean(potentials)))


def logistic_loss(
    features: Array, labels: NDArray[np.int64], weight: Array, bias: Array, decay: float
) -> float:
    """Return the mean cross-entropy of logits ``x @ weight + bias`` plus ``decay / 2 * |weight|^2``."""
    total = 0.0
    for row, label in zip(features, labels, strict=True):
        logits = row @ weight + bias
        high = logits.max()
        total += high + np.log(np.sum(np.exp(logits - high))) - logits[label]
    return float(total / len(features) + decay / 2 * np.sum(weight**2))

"""Reimplement the bank, the search and the policy in plain Python loops, without code of memory_bank."""

import math
from collections import deque

import numpy as np


class DatasetModel:
    """Dataset bank as a dictionary: row -> (key, step)."""

    def __init__(self):
        self.rows, self.refused = {}, 0

    def write(self, keys, ids, step):
        for key, row in zip(keys, ids, strict=True):
            if np.isfinite(key).all():
                self.rows[int(row)] = (key, step)
            else:
                self.refused += 1

    def contents(self):
        return sorted((row, step, tuple(key)) for row, (key, step) in self.rows.items())


class QueueModel:
    """Queue bank as a deque of the newest (row, key, step)."""

    def __init__(self, capacity):
        self.items, self.refused = deque(maxlen=capacity), 0

    def write(self, keys, ids, step):
        for key, row in zip(keys, ids, strict=True):
            if np.isfinite(key).all():
                self.items.append((int(row), step, tuple(key)))
            else:
                self.refused += 1

    def contents(self):
        return sorted(self.items)


def nearest(query, keys, ids, admissible, own, k):
    """Return the slots of the k most similar admissible rows of another id than ``own``, closest first."""
    scored = [
        (-float(np.dot(query, keys[slot])), slot)
        for slot in range(len(keys))
        if admissible[slot] and ids[slot] != own
    ]
    return [slot for _, slot in sorted(scored)[:k]]


def policy_window(similarities, positive, config, skip, band):
    """Return positions (by descending similarity) that hard negatives may come from, and attracted ones.

    ``similarities``: of the admissible rows, closest first.
    """
    total, most = len(similarities), min(upper_limits(positive, config), default=2)
    least = -2 if config.min_similarity is None else config.min_similarity
    alike, rest = [], []
    for rank, similarity in enumerate(similarities):
        likely = rank < config.false_negative_rank and similarity > config.false_negative_threshold
        if config.false_negative != "off" and likely:
            alike.append(rank)
        elif least <= similarity <= most:
            rest.append(rank)
    low, high = round_up(band[0] * total), round_up(band[1] * total)
    if not config.refill:
        first = round_up(skip * total)
        return [rank for rank in rest if first + low <= rank < first + high], alike
    skipped = min(round_up(skip * total), max(0, len(rest) - config.num_hard))
    rest = rest[skipped:]
    high = min(max(high, low + config.num_hard), len(rest))
    low = min(low, max(0, len(rest) - config.num_hard))
    return rest[low:high], alike


def upper_limits(positive, config):
    """Return the similarities above which a row is dropped."""
    limits = []
    if config.max_similarity is not None:
        limits.append(config.max_similarity)
    if config.absolute_margin is not None:
        limits.append(positive - config.absolute_margin)
    if config.relative_margin is not None:
        limits.append(positive - config.relative_margin * abs(positive))
    return limits


def round_up(value):
    return math.ceil(round(value, 9))

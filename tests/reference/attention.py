"""Attention by loops, from the papers; shares no code with ours."""

import math

import numpy as np


def softmax_weights(query, key):
    """Softmax of q k / sqrt(d) for one head, in float64: Vaswani et al. 2017, eq. 1."""
    weights = np.zeros((len(query), len(key)))
    for i, q in enumerate(query.astype(np.float64)):
        scores = [float(q @ k) / math.sqrt(len(q)) for k in key.astype(np.float64)]
        powers = [math.exp(score - max(scores)) for score in scores]
        weights[i] = [power / sum(powers) for power in powers]
    return weights


def rollout(blocks):
    """Attention rollout of one image: Abnar and Zuidema 2020; ``blocks`` are (heads, m, m), in order."""
    size = blocks[0].shape[-1]
    joint = np.eye(size)
    for heads in blocks:
        mean = sum(head.astype(np.float64) for head in heads) / len(heads)
        mixed, product = (mean + np.eye(size)) / 2, np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                product[i, j] = sum(mixed[i, k] * joint[k, j] for k in range(size))
        joint = product
    return joint


def over_area(weights, mask):
    """Share of a map on a mask over the mask's share of the area; positions are squares of the mask."""
    rows, columns = weights.shape
    height, width = mask.shape[0] // rows, mask.shape[1] // columns
    inside = total = thing = 0.0
    for row in range(rows):
        for column in range(columns):
            part = mask[row * height : (row + 1) * height, column * width : (column + 1) * width]
            weight = max(0.0, float(weights[row, column]))
            inside += weight * float(part.mean())
            total += weight
            thing += float(part.mean())
    return inside / total / (thing / (rows * columns))

"""Temporal heads for one clip, by loops in float64; shares no code with ours.

``tensors`` are a head's weights by name, as float64 arrays; ``frames`` is (t, d).
"""

import math

import numpy as np

from tests.reference.attention import rollout, softmax_weights


def linear(tensors, name, x):
    bias = tensors.get(f"{name}.bias", np.zeros(len(tensors[f"{name}.weight"])))
    return [
        sum(weight * value for weight, value in zip(row, x, strict=True)) + offset
        for row, offset in zip(tensors[f"{name}.weight"], bias, strict=True)
    ]


def layer_norm(tensors, name, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scale, offset = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return [(v - mean) / math.sqrt(variance + 1e-5) * s + o for v, s, o in zip(x, scale, offset, strict=True)]


def position(j, dim):
    half = dim // 2
    rates = [(1000 / (2 * math.pi)) ** (-2 * i / dim) for i in range(half)]
    return [math.sin(j * r) for r in rates] + [math.cos(j * r) for r in rates] + [0.0] * (dim % 2)


def enter(tensors, frames):
    projected = [linear(tensors, "enter.project", layer_norm(tensors, "enter.norm", x)) for x in frames]
    return np.array([np.add(x, position(j, len(x))) for j, x in enumerate(projected)])


def mean(frames):
    t = len(frames)
    return [sum(frame[i] for frame in frames) / t for i in range(len(frames[0]))], [1 / t] * t


def attention(tensors, frames, layers, heads):
    x = np.concatenate([tensors["token"][0], enter(tensors, frames)])
    dim, maps = x.shape[1], []
    for block in range(layers):
        name = f"blocks.{block}"
        qkv = np.array([linear(tensors, f"{name}.qkv", layer_norm(tensors, f"{name}.norm_1", r)) for r in x])
        outputs, weights = [], []
        for head in range(heads):
            own = slice(head * dim // heads, (head + 1) * dim // heads)
            query, key, value = (qkv[:, part * dim : (part + 1) * dim][:, own] for part in range(3))
            weights.append(softmax_weights(query, key))
            outputs.append(weights[-1] @ value)
        x = x + [linear(tensors, f"{name}.out", row) for row in np.concatenate(outputs, axis=1)]
        for i, row in enumerate(x.copy()):
            hidden = linear(tensors, f"{name}.mlp.0", layer_norm(tensors, f"{name}.norm_2", row))
            hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden]
            x[i] = row + linear(tensors, f"{name}.mlp.2", hidden)
        maps.append(np.stack(weights))
    over_frames = rollout(maps)[0, 1:]
    return layer_norm(tensors, "norm", x[0]), over_frames / sum(over_frames)


def nuta(tensors, frames):
    x = enter(tensors, frames)
    t, dim = x.shape
    pairs = [np.mean(x[i : i + 2], axis=0) for i in range(0, t, 2)]
    query = np.array([linear(tensors, "query", pair) for pair in pairs])
    chosen_from = softmax_weights(query, np.array([linear(tensors, "key", row) for row in x]))
    value = [linear(tensors, "value", row) for row in x]
    chosen, moments = [], []
    for weights in chosen_from:
        chosen.append(sum(w * np.array(v) for w, v in zip(weights, value, strict=True)))
        moments.append(sum(w * j for j, w in enumerate(weights)))
    joined = np.zeros((t + 2, 2 * dim))  # with a frame of zeros at either end, for the convolution
    for j in range(t):
        near = [math.exp(-((j - moment) ** 2) / 2) for moment in moments]
        synchronised = sum(n * c for n, c in zip(near, chosen, strict=True)) / sum(near)
        joined[j + 1] = [*x[j], *synchronised]
    feature = np.zeros(dim)
    for j in range(t):
        for channel in range(dim):
            total = tensors["join.bias"][channel]
            for offset in range(3):
                total += float(tensors["join.weight"][channel, :, offset] @ joined[j + offset])
            feature[channel] += max(0.0, total) / t
    return feature, chosen_from.mean(0)

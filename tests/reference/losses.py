"""Compute objectives and optimizers by plain loops in float64, from the papers, without the package's code.

A set of negatives is a list, one entry per query, of ``(rows, weights)``; an excluded row has weight 0.
A set of positives is a list of ``(rows, weights)`` too, the key first with weight 1.
"""

import math

import numpy as np


def similarities(query, rows, temperature):
    return [sum(float(a) * float(b) for a, b in zip(query, row, strict=True)) / temperature for row in rows]


def _mean_over_positives(query, positives, temperature, one):
    rows, weights = positives
    logits = similarities(query, rows, temperature)
    return sum(w * one(s) for s, w in zip(logits, weights, strict=True)) / sum(weights)


def _negative_mass(query, negatives, temperature):
    rows, weights = negatives
    logits = similarities(query, rows, temperature)
    return sum(w * math.exp(s) for s, w in zip(logits, weights, strict=True))


def info_nce(queries, positives, negatives, temperature):
    losses = []
    for query, own, others in zip(queries, positives, negatives, strict=True):
        mass = _negative_mass(query, others, temperature)
        losses.append(
            _mean_over_positives(
                query, own, temperature, lambda s, mass=mass: -math.log(math.exp(s) / (math.exp(s) + mass))
            )
        )
    return float(np.mean(losses))


def dcl(queries, positives, negatives, temperature, pull=None):
    losses = []
    for i, (query, own, others) in enumerate(zip(queries, positives, negatives, strict=True)):
        mass = _negative_mass(query, others, temperature)
        weight = 1.0 if pull is None else pull[i]
        if mass == 0:
            losses.append(0.0)
            continue
        losses.append(
            _mean_over_positives(
                query,
                own,
                temperature,
                lambda s, mass=mass, weight=weight: -math.log(math.exp(weight * s) / mass),
            )
        )
    return float(np.mean(losses))


def dclw(queries, positives, negatives, temperature, sigma):
    agreement = [
        math.exp(similarities(q, own[0][:1], 1.0)[0] / sigma)
        for q, own in zip(queries, positives, strict=True)
    ]
    pull = [2 - value / (sum(agreement) / len(agreement)) for value in agreement]
    return dcl(queries, positives, negatives, temperature, pull)


def hcl(queries, positives, negatives, temperature, tau_plus, beta):
    losses = []
    for query, own, (rows, weights) in zip(queries, positives, negatives, strict=True):
        number = sum(weights)
        if number == 0:
            losses.append(0.0)
            continue
        logits = similarities(query, rows, temperature)
        importance = [w * math.exp(beta * s) for s, w in zip(logits, weights, strict=True)]
        hardness = sum(v * math.exp(s) for v, s in zip(importance, logits, strict=True)) / sum(importance)
        positive = _mean_over_positives(query, own, temperature, math.exp)
        estimate = max((hardness - tau_plus * positive) / (1 - tau_plus), math.exp(-1 / temperature))
        mass = number * estimate
        losses.append(
            _mean_over_positives(
                query, own, temperature, lambda s, mass=mass: -math.log(math.exp(s) / (math.exp(s) + mass))
            )
        )
    return float(np.mean(losses))


def nt_xent(first, second, temperature):
    """Compute SimCLR's algorithm 1: views 2k-1 and 2k of image k in one list."""
    views = [view for pair in zip(first, second, strict=True) for view in pair]
    total = 0.0
    for i, anchor in enumerate(views):
        partner = i + 1 if i % 2 == 0 else i - 1
        logits = similarities(anchor, views, temperature)
        denominator = sum(math.exp(s) for j, s in enumerate(logits) if j != i)
        total += -math.log(math.exp(logits[partner]) / denominator)
    return total / len(views)


def moco_v3(query_1, query_2, key_1, key_2, temperature):
    """Compute Chen et al. 2021, algorithm 1, over 4 temperature: ``ctr(q1, k2) + ctr(q2, k1)``.

    Each query finds the key of its image among those of the other view of all images.
    """
    total = 0.0
    for queries, keys in ((query_1, key_2), (query_2, key_1)):
        for i, query in enumerate(queries):
            logits = similarities(query, keys, temperature)
            total += -math.log(math.exp(logits[i]) / sum(math.exp(s) for s in logits))
    return total / (2 * len(query_1))


def nnclr(neighbours, predictions, temperature):
    """Compute Dwibedi et al. 2021, eq. 2: row i of ``neighbours`` is NN(z_i), of ``predictions`` view 2's."""
    total = 0.0
    for i, neighbour in enumerate(neighbours):
        logits = similarities(neighbour, predictions, temperature)
        total += -math.log(math.exp(logits[i]) / sum(math.exp(s) for s in logits))
    return total / len(neighbours)


def supcon(queries, positives, negatives, temperature, same):
    """Compute eq. 2; ``same[i][j]``: negative j of query i carries its label."""
    losses = []
    for i, (query, own, others) in enumerate(zip(queries, positives, negatives, strict=True)):
        logits = similarities(query, own[0], temperature) + similarities(query, others[0], temperature)
        weights = [*own[1], *others[1]]
        pulls = [*own[1], *(w if hit else 0.0 for w, hit in zip(others[1], same[i], strict=True))]
        denominator = sum(w * math.exp(s) for s, w in zip(logits, weights, strict=True))
        total = sum(
            w * -math.log(math.exp(s) / denominator) for s, w in zip(logits, pulls, strict=True) if w > 0
        )
        losses.append(total / sum(pulls))
    return float(np.mean(losses))


def mixed(query, negatives, hardest, num_pairs, num_query, uniforms):
    """Return MoCHi's synthetic rows of one query, from the same uniform numbers, in the package's order."""
    rows, weights = negatives
    admitted = [row for row, weight in zip(rows, weights, strict=True) if weight > 0]
    admitted.sort(key=lambda row: -float(np.dot(query, row)))
    pool = admitted[:hardest]
    if not pool:
        return []
    numbers = list(uniforms)
    index_i, index_j, share = (numbers[j * num_pairs : (j + 1) * num_pairs] for j in range(3))
    rest = numbers[3 * num_pairs :]
    index_q, share_q = rest[:num_query], rest[num_query : 2 * num_query]
    synthetic = []
    for i, j, a in zip(index_i, index_j, share, strict=True):
        synthetic.append(a * pool[int(i * len(pool))] + (1 - a) * pool[int(j * len(pool))])
    for i, c in zip(index_q, share_q, strict=True):
        synthetic.append(c / 2 * np.asarray(query) + (1 - c / 2) * pool[int(i * len(pool))])
    return [row / math.sqrt(float(np.dot(row, row))) for row in synthetic]


def sgd(weights, gradients, rates, momentum, weight_decay):
    """Return weights after each step: Sutskever et al. 2013 as in PyTorch, decay added to the gradient."""
    weight, velocity, trace = np.array(weights, float), np.zeros(np.shape(weights)), []
    for gradient, rate in zip(gradients, rates, strict=True):
        velocity = momentum * velocity + np.array(gradient, float) + weight_decay * weight
        weight = weight - rate * velocity
        trace.append(weight.copy())
    return trace


def adamw(weights, gradients, rates, weight_decay, betas=(0.9, 0.999), epsilon=1e-8):
    """Return weights after each step: Loshchilov, Hutter 2019 (arXiv:1711.05101), algorithm 2."""
    weight, trace = np.array(weights, float), []
    mean, square = np.zeros(np.shape(weights)), np.zeros(np.shape(weights))
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        mean = betas[0] * mean + (1 - betas[0]) * np.array(gradient, float)
        square = betas[1] * square + (1 - betas[1]) * np.array(gradient, float) ** 2
        unbiased = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        weight = weight - rate * weight_decay * weight - rate * unbiased[0] / (np.sqrt(unbiased[1]) + epsilon)
        trace.append(weight.copy())
    return trace


def lars(weights, gradients, rates, momentum, weight_decay, trust, adapt=True):
    """Return one layer's weights after each step: You et al. 2017, algorithm 1."""
    weight, velocity, trace = np.array(weights, float), np.zeros(np.shape(weights)), []
    for gradient, rate in zip(gradients, rates, strict=True):
        update = np.array(gradient, float) + weight_decay * weight
        size, step = math.sqrt(float((weight**2).sum())), math.sqrt(float((update**2).sum()))
        local = trust * size / step if adapt and size > 0 and step > 0 else 1.0
        velocity = momentum * velocity + rate * local * update
        weight = weight - velocity
        trace.append(weight.copy())
    return trace


def sogclr_denominators(views, rows, denominators, temperature, gamma):
    """SogCLR, algorithm 1, lines 5 and 6: return the running denominators after a batch.

    ``views``: two lists of the batch's embeddings; ``denominators``: dict of row -> u, without unseen rows.
    """
    after = dict(denominators)
    for i, row in enumerate(rows):
        estimate = sum(_sogclr_mean(view[i], views, i, temperature) for view in views) / 2
        after[row] = (1 - gamma) * after[row] + gamma * estimate if row in after else estimate
    return after


def sogclr_gradients(views, rows, denominators, temperature):
    """SogCLR, algorithm 1, line 8, over temperature: the gradient for each embedding of both views.

    ``denominators``: those after the batch. The derivative of ``-s_i / T + g_i / u_i``, pair by pair.
    """
    count = len(rows)
    gradients = np.zeros((2, count, len(views[0][0])))
    for i, row in enumerate(rows):
        gradients[0, i] -= views[1][i] / temperature / count
        gradients[1, i] -= views[0][i] / temperature / count
        for side in (0, 1):
            for j in range(count):
                for other in (0, 1) if j != i else ():
                    (similarity,) = similarities(views[side][i], [views[other][j]], temperature)
                    weight = math.exp(similarity) / (2 * (count - 1)) / (2 * denominators[row])
                    gradients[side, i] += weight * views[other][j] / temperature / count
                    gradients[other, j] += weight * views[side][i] / temperature / count
    return gradients


def _sogclr_mean(query, views, own, temperature):
    others = [view[j] for j in range(len(views[0])) if j != own for view in views]
    return float(np.mean([math.exp(s) for s in similarities(query, others, temperature)]))

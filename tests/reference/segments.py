"""Scores of segmentations, Viterbi paths and transport plans by plain loops and by trying everything."""

import itertools
import math


def segments(labels):
    """Return (label, set of frames) of each run."""
    found = []
    for frame, label in enumerate(labels):
        if found and found[-1][0] == label:
            found[-1][1].add(frame)
        else:
            found.append((label, {frame}))
    return found


def best_match(predicted, truth):
    """Try every assignment of predicted to true actions; return the one with most right frames."""
    mine, theirs = sorted({*predicted}), sorted({*truth})
    places = [*theirs, *[None] * len(mine)]
    best = max(
        ({*itertools.permutations(places, len(mine))}),
        key=lambda chosen: sum(
            dict(zip(mine, chosen, strict=True))[p] == t for p, t in zip(predicted, truth, strict=True)
        ),
    )
    return dict(zip(mine, best, strict=True))


def f1(recordings, overlap):
    """Score segments of (named, truth) pairs, frame sets compared one by one."""
    right = superfluous = missed = 0
    for named, truth in recordings:
        real = segments(truth)
        free = [True] * len(real)
        for label, frames in segments(named):
            best, at = -1.0, None
            for index, (name, others) in enumerate(real):
                iou = len(frames & others) / len(frames | others)
                if name == label and iou > best:
                    best, at = iou, index
            if at is not None and best >= overlap and free[at]:
                right, free[at] = right + 1, False
            else:
                superfluous += 1
        missed += sum(free)
    return 2 * right / (2 * right + superfluous + missed)


def edit(recordings):
    """Average 1 - edit distance / length, the distance by recursion on the first elements."""

    def distance(one, other):
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))

    scores = []
    for named, truth in recordings:
        orders = [[label for label, _ in segments(each)] for each in (named, truth)]
        scores.append(1 - distance(*orders) / max(map(len, orders)))
    return sum(scores) / len(scores)


def mean_iou(recordings):
    """Average over true actions the frames that both name by those that either names."""
    values = []
    for action in sorted({label for _, truth in recordings for label in truth}):
        both = either = 0
        for named, truth in recordings:
            for mine, real in zip(named, truth, strict=True):
                both += mine == action and real == action
                either += mine == action or real == action
        values.append(both / either)
    return sum(values) / len(values)


def frames_right(recordings):
    """Return the share of frames that are named right."""
    pairs = [pair for named, truth in recordings for pair in zip(named, truth, strict=True)]
    return sum(mine == real for mine, real in pairs) / len(pairs)


def best_path(scores, cost):
    """Try every path through (frames, actions)."""
    frames, actions = len(scores), len(scores[0])

    def worth(path):
        stays = sum(scores[frame][action] for frame, action in enumerate(path))
        return stays - sum(cost[before][after] for before, after in itertools.pairwise(path))

    return max(itertools.product(range(actions), repeat=frames), key=worth)


def transport_plan(cost, *, alpha, radius, balance, entropy, steps, first):
    """Return ASOT's plan, times the number of frames, by loops over frames, actions and their pairs."""
    n, a = len(cost), len(cost[0])
    plan = [[1 / (n * a)] * a for _ in range(n)]
    reach, size = max(1, int(radius * n)), None

    def near(i, k):
        return 1 / radius if i != k and abs(i - k) <= reach else 0.0

    for _ in range(steps):
        used = [sum(plan[i][j] for i in range(n)) for j in range(a)]
        gradient = [[0.0] * a for _ in range(n)]
        for i in range(n):
            for j in range(a):
                apart = sum(near(i, k) * plan[k][m] for k in range(n) for m in range(a) if m != j)
                gradient[i][j] = (
                    (1 - alpha) * cost[i][j]
                    + alpha * apart
                    + balance * (math.log(used[j] * a) + 1)
                    + entropy * math.log(plan[i][j])
                )
        size = size or first / max(abs(value) for row in gradient for value in row)
        plan = [
            [mass * math.exp(-size * slope) for mass, slope in zip(*both, strict=True)]
            for both in zip(plan, gradient, strict=True)
        ]
        plan = [[mass / (n * sum(row)) for mass in row] for row in plan]
    return [[n * mass for mass in row] for row in plan]

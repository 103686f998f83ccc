"""Divide recordings into actions without labels: sub-actions, groups of them, the likeliest path."""

import itertools
from dataclasses import dataclass
from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from eval.transport import decode_by_transport

faiss: Any = _faiss  # its annotations cover only some of its classes

_DIMENSIONS = 32  # of the features that are clustered
_ITERATIONS = 25  # of k-means
_MOST_TRAINED = 1024  # frames a cluster that k-means is trained on
_MOST_ROUNDS = 10  # of decoding and counting
DECODERS = ("viterbi", "transport")
_RIDGE = 0.003  # added to the variance along each axis before whitening, as a share of the sum over all axes
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Segmentation:
    """The actions of all recordings.

    Attributes:
        path: Action of each frame as it was decoded: on the likeliest path, or by the transport plan.
        argmax: Action of each frame by its closest sub-action alone.
        sub_action: The closest sub-action of each frame.
        group: Action of each sub-action.
        duration: Mean length of an action in frames, that the switch cost follows from.
        eigenvalues: Of the sub-actions' co-occurrence, largest first; see ``largest_gap``.
    """

    path: Int[np.ndarray, " n"]
    argmax: Int[np.ndarray, " n"]
    sub_action: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " s"]
    duration: float
    eigenvalues: Float[np.ndarray, " s"]


def segment(
    features: Float[np.ndarray, "n d"],
    starts: Int[np.ndarray, " v"],
    *,
    sub_actions: int,
    actions: int | None = None,
    duration: float | None = None,
    evidence: float = 1.0,
    decoder: str = "viterbi",
    seed: int = 0,
) -> Segmentation:
    """Find the actions of recordings, the same for all of them.

    After SSCAP (Wang et al. 2022, arXiv:2105.14158), by its abstract: self-supervised features, sub-actions,
    their co-occurrence, and a path estimated in time. Ours, as the abstract does not say how: sub-actions are
    clusters of k-means over all frames of all recordings. Actions are groups of them, by spectral clustering
    of how often they follow one another. The path is that of a hidden Markov model. A switch costs the
    same in all recordings, set without labels: by the mean duration of an action (``estimate_duration``), and
    by which action follows which.

    Args:
        features: Of all frames, one recording after the other; see ``describe_windows``.
        starts: First row of each recording, and the number of frames at the end.
        sub_actions: Number of clusters, at most the number of frames.
        actions: Number of groups, at most ``sub_actions``; None takes that below which is the largest gap
            among the eigenvalues of the normalised co-occurrence (von Luxburg 2007, "A tutorial on spectral
            clustering", section 8.3).
        duration: Mean length of an action in frames; None estimates it.
        evidence: Weight of a frame's log-likelihood: 1 for independent frames, less where neighbours repeat
            one another.
        decoder: ``viterbi``, or ``transport`` (eval/transport.py), which uses neither duration nor evidence:
            its cost is the cosine distance to the closest centre of an action's sub-actions.
        seed: Of k-means and of spectral clustering.

    Raises:
        ValueError: more sub-actions than frames, or more actions than sub-actions.
    """
    if not 1 <= (actions or 1) <= sub_actions <= len(features):
        raise ValueError(
            f"sub_actions={sub_actions}, actions={actions}: allowed are up to {len(features)}, the frames, "
            "and up to sub_actions"
        )
    rows = project(features, _DIMENSIONS)
    centres = cluster(rows, sub_actions, seed)
    distances = np.maximum(
        np.square(rows).sum(1)[:, None] - 2 * rows @ centres.T + np.square(centres).sum(1), 0
    )
    sub = distances.argmin(1)
    affinity = co_occurrence(sub, starts, sub_actions)
    eigenvalues = np.linalg.eigvalsh(affinity)[::-1]
    group = group_sub_actions(affinity, actions or largest_gap(eigenvalues), seed)
    first = group[sub]
    length = duration or estimate_duration(first, starts)
    if decoder == "transport":
        path = decode_by_transport(cosine_cost(rows, centres, group), starts)
        return Segmentation(path, first, sub, group, length, eigenvalues)
    frames = log_likelihood(distances, sub, group, rows.shape[1]) * evidence
    path = first
    for _ in range(_MOST_ROUNDS):  # which follows which is counted on the path, which needs it
        before, path = path, decode(frames, starts, switch_cost(path, starts, len(set(group)), length))
        if np.array_equal(before, path):
            break
    return Segmentation(path, first, sub, group, length, eigenvalues)


def describe_windows(
    features: Float[np.ndarray, "n d"], starts: Int[np.ndarray, " v"], window: int
) -> Float[np.ndarray, "n d2"]:
    """Return what each frame's surroundings look like, and how they move.

    Features are centred and whitened by those of their recording, so that who acts, and where, is no action,
    and what changes most, such as the side that is seen, does not hide the rest. Then their mean over a
    window of frames says which pose, and their standard deviation which motion.

    Args:
        features: Of all frames, one recording after the other.
        starts: First row of each recording, and the number of frames at the end.
        window: Frames, odd; beyond its ends a recording is mirrored. 1 gives no motion.
    """
    centred = np.concatenate([_centred(features[start:end]) for start, end in itertools.pairwise(starts)])
    rows, reach = project(centred, 2 * _DIMENSIONS), window // 2
    rows = np.concatenate([_whitened(rows[start:end]) for start, end in itertools.pairwise(starts)])
    if not reach:
        return rows
    parts = []
    for start, end in itertools.pairwise(starts):
        mean, square = (_moving_mean(each, reach) for each in (rows[start:end], np.square(rows[start:end])))
        parts.append(np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0))], 1))
    return np.concatenate(parts).astype(np.float32)


def _centred(rows: Floats) -> Floats:
    """Return the features of a recording with mean 0 and mean square length 1."""
    moved = rows - rows.mean(0, dtype=np.float64).astype(np.float32)
    return np.asarray(moved / max(float(np.sqrt(np.square(moved).sum(1).mean())), 1e-12), np.float32)


def _whitened(rows: Floats) -> Floats:
    """Return centred features of a recording with about the same variance along each of their axes.

    They are turned back to the axes that all recordings share (ZCA), and have mean square length 1.
    """
    variances, axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    variances = np.maximum(variances, 0)
    scales = 1 / np.sqrt(variances + max(_RIDGE * float(variances.sum()), 1e-12))
    return _centred(rows @ np.asarray(axes * scales @ axes.T, np.float32))


def _moving_mean(rows: Floats, reach: int) -> Floats:
    sums = np.pad(rows, ((reach, reach), (0, 0)), "symmetric").cumsum(0, dtype=np.float64)
    sums = np.concatenate([np.zeros((1, rows.shape[1])), sums])
    width = 2 * reach + 1
    return np.asarray((sums[width:] - sums[:-width]) / width)


def project(features: Float[np.ndarray, "n d"], dimensions: int) -> Float[np.ndarray, "n e"]:
    """Return the features along their first principal components, all if they have no more dimensions."""
    from sklearn.decomposition import PCA  # slow to import, and used here alone

    rows = np.asarray(features, np.float32)
    if rows.shape[1] <= dimensions:
        return np.asarray(rows - rows.mean(0, dtype=np.float64).astype(np.float32))
    axes = PCA(min(dimensions, len(rows)), random_state=0)
    with np.errstate(invalid="ignore"):  # of constant features it computes shares of no variance
        return np.asarray(axes.fit_transform(rows), order="C")


def cluster(rows: Float[np.ndarray, "n e"], count: int, seed: int) -> Float[np.ndarray, "s e"]:
    """Return the ``count`` centres that k-means finds."""
    means = faiss.Kmeans(
        rows.shape[1], count, niter=_ITERATIONS, nredo=3, seed=seed,
        min_points_per_centroid=1, max_points_per_centroid=_MOST_TRAINED,
    )  # fmt: skip
    means.train(rows)
    return np.asarray(means.centroids)


def co_occurrence(sub: Int[np.ndarray, " n"], starts: Int[np.ndarray, " v"], count: int) -> Floats:
    """Return how often two sub-actions follow one another, in either order, (count, count).

    Normalised by how often each changes: D^-1/2 C D^-1/2, so that its largest eigenvalue is 1.
    """
    counts = count_transitions(sub, starts, count).astype(np.float64)
    np.fill_diagonal(counts, 0)
    both = counts + counts.T + 1e-6  # a sub-action that never changes belongs to none more than to another
    degree = 1 / np.sqrt(both.sum(1))
    return np.asarray(both * degree[:, None] * degree)


def count_transitions(labels: Int[np.ndarray, " n"], starts: Int[np.ndarray, " v"], count: int) -> Ints:
    """Count neighbouring frames by their labels, (before, after), never across two recordings."""
    inside = np.ones(max(0, len(labels) - 1), bool)
    inside[np.asarray(starts[1:-1], np.int64) - 1] = False
    pairs = labels[:-1][inside] * count + labels[1:][inside]
    return np.bincount(pairs, minlength=count**2).reshape(count, count)


def largest_gap(eigenvalues: Float[np.ndarray, " s"]) -> int:
    """Return the number of eigenvalues above their largest gap, 2 or more; all of up to two."""
    if len(eigenvalues) < 3:
        return len(eigenvalues)
    return 2 + int(np.argmax(eigenvalues[1:-1] - eigenvalues[2:]))


def group_sub_actions(affinity: Float[np.ndarray, "s s"], count: int, seed: int) -> Ints:
    """Return the group of each sub-action by spectral clustering; each alone if there are as many groups."""
    from sklearn.cluster import SpectralClustering  # slow to import, and used here alone

    if count >= len(affinity):
        return np.arange(len(affinity))
    found = SpectralClustering(count, affinity="precomputed", random_state=seed, assign_labels="kmeans").fit(
        affinity
    )
    return np.unique(found.labels_, return_inverse=True)[1]


def log_likelihood(
    distances: Float[np.ndarray, "n s"], sub: Int[np.ndarray, " n"], group: Int[np.ndarray, " s"], dim: int
) -> Floats:
    """Return log p(frame | action) up to a constant, (n, a): mixtures of Gaussians of one width."""
    variance = max(float(distances.min(1).mean()) / dim, 1e-12)
    shares = np.bincount(sub, minlength=len(group)).astype(np.float64)
    of_action = np.maximum(np.bincount(group, shares), 1)[group]  # that of an action without frames is 0
    weight = np.log(np.maximum(shares / of_action, 1e-12))
    scores = weight - distances / (2 * variance)
    best = [scores[:, group == action] for action in range(group.max() + 1)]
    return np.stack([_log_sum(each) for each in best], 1)


def cosine_cost(
    rows: Float[np.ndarray, "n e"], centres: Float[np.ndarray, "s e"], group: Int[np.ndarray, " s"]
) -> Float[np.ndarray, "n a"]:
    """Return 1 - the cosine of the angle between each row and the closest centre of each action."""
    frames, means = (
        each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (rows, centres)
    )
    cosines = frames @ means.T
    return np.stack([1 - cosines[:, group == action].max(1) for action in range(group.max() + 1)], 1)


def _log_sum(scores: Floats) -> Floats:
    top = scores.max(1)
    return np.asarray(top + np.log(np.exp(scores - top[:, None]).sum(1)))


def estimate_duration(labels: Int[np.ndarray, " n"], starts: Int[np.ndarray, " v"]) -> float:
    """Estimate the mean length of a segment, in frames, from labels that flicker.

    If segments end at random, with mean length L, two frames at a lag are in the same one with probability
    exp(-lag / L), and then their labels agree more often than by chance. Flicker scales this excess and
    leaves its decay as it is. So L is the lag over which the excess falls to 1/e of what it is at lag 2, the
    first at which a label that flickers for one frame does not agree with itself.

    Returns:
        At least 2, at most the mean length of a recording.
    """
    labels = np.asarray(labels)
    longest = int(np.diff(starts).max())
    shares = np.bincount(labels) / len(labels)
    chance, most = float(np.square(shares).sum()), float(np.diff(starts).mean())
    reference = None
    for lag in range(2, longest):
        agree, pairs = 0, 0
        for start, end in itertools.pairwise(starts):
            agree += (
                int((labels[start : end - lag] == labels[start + lag : end]).sum())
                if end - start > lag
                else 0
            )
            pairs += max(0, int(end - start) - lag)
        excess = agree / max(1, pairs) - chance
        reference = excess if reference is None else reference
        if excess <= reference / np.e:
            return float(np.clip(lag - 2, 2, most))
    return max(2.0, most)


def switch_cost(
    labels: Int[np.ndarray, " n"], starts: Int[np.ndarray, " v"], count: int, duration: float
) -> Float[np.ndarray, "a a"]:
    """Return minus the log-probability that one action follows another in the next frame.

    An action goes on with probability 1 - 1 / duration. Otherwise the next one is as likely as it followed
    elsewhere, with one added to each count.
    """
    counts = count_transitions(labels, starts, count) + 1.0
    np.fill_diagonal(counts, 0)
    after = counts / np.maximum(counts.sum(1, keepdims=True), 1) / duration
    np.fill_diagonal(after, 1 - 1 / duration)
    return np.asarray(-np.log(np.maximum(after, 1e-300)))


def decode(
    log_likelihood: Float[np.ndarray, "n a"], starts: Int[np.ndarray, " v"], cost: Float[np.ndarray, "a a"]
) -> Ints:
    """Return the likeliest path of each recording: the largest sum of log-likelihoods less costs (Viterbi).

    Args:
        log_likelihood: Of each frame under each action.
        starts: First row of each recording, and the number of frames at the end.
        cost: Of going from one action (row) to another (column) between neighbouring frames.
    """
    parts = [_viterbi(log_likelihood[start:end], cost) for start, end in itertools.pairwise(starts)]
    return np.concatenate(parts)


def _viterbi(scores: Floats, cost: Floats) -> Ints:
    n, count = scores.shape
    came_from = np.zeros((n, count), np.int64)
    total, columns, down = scores[0], np.arange(count), np.ascontiguousarray(cost.T)
    for frame in range(1, n):
        reached = total - down  # (to, from)
        came_from[frame] = reached.argmax(1)
        total = reached[columns, came_from[frame]] + scores[frame]
    path = np.zeros(n, np.int64)
    path[-1] = total.argmax()
    for frame in range(n - 1, 0, -1):
        path[frame - 1] = came_from[frame, path[frame]]
    return path

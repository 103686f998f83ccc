"""Re-identification scores by plain loops, one query and one gallery entry at a time."""

import numpy as np


def left_out(same, own, query_camera, camera):
    """Return whether the protocol leaves an entry out for a query."""
    return own or (same and camera is not None and camera == query_camera)


def query_scores(similarity, identities, cameras, own, query, query_camera, ks):
    """Rank all entries of a gallery for one query and walk down the list.

    Args:
        similarity: Cosine of each entry.
        identities: Identity of each entry.
        cameras: Camera of each entry, or None.
        own: Entry that is the query itself, or None.
        query: Identity of the query.
        query_camera: Its camera.
        ks: The k of R@k.

    Returns:
        R@k for each k, average precision, inverse negative penalty; None if there is no right entry.
    """
    seen = right = 0
    precisions, first, last = [], None, None
    for entry in sorted(range(len(similarity)), key=lambda entry: -similarity[entry]):
        camera = None if cameras is None else cameras[entry]
        same = identities[entry] == query
        if left_out(same, entry == own, query_camera, camera):
            continue
        seen += 1
        if same:
            right += 1
            precisions.append(right / seen)
            first = first or seen
            last = seen
    if not right:
        return None
    return [*(float(first <= k) for k in ks), sum(precisions) / right, right / last]


def market_scores(similarity, identities, cameras, query, query_camera, ks):
    """Score one query by arrays, as evaluations of Market-1501 do: keep, match, accumulate.

    The average precision is the mean over hits of hits so far by the rank, from the accumulated matches.
    """
    order = np.argsort(-similarity)
    keep = ~((identities[order] == query) & (cameras[order] == query_camera))
    matches = (identities[order] == query)[keep].astype(int)
    if not matches.any():
        return None
    reached = np.minimum(matches.cumsum(), 1)
    ranks = np.flatnonzero(matches) + 1
    average = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return [*(float(reached[min(k, len(reached)) - 1]) for k in ks), average, len(ranks) / ranks[-1]]


def one_each(similarity, identities, cameras, own, query, query_camera):
    """Return the gallery in which each identity (and camera) is its closest entry, own picture left out."""
    best = {}
    for entry in range(len(similarity)):
        camera = None if cameras is None else cameras[entry]
        if entry == own and cameras is None:
            continue
        name = (identities[entry], camera)
        if name not in best or similarity[entry] > similarity[best[name]]:
            best[name] = entry
    return sorted(best.values())

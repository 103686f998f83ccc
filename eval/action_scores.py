"""Score actions that were found without labels against the true ones: MoF, F1, mIoU, edit."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from eval.scores import Line, t_interval

OVERLAPS = (0.10, 0.25, 0.50)
"""Least intersection over union of a segment that counts as found, for F1@10, F1@25, F1@50."""
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Counts of which the scores of recordings are computed; those of several recordings add up.

    Attributes:
        frames: Frames that are right, and all frames.
        segments: Right, superfluous and missed segments, for each of ``OVERLAPS``.
        shared: Frames of each true action that have it in both, and in one or both.
        edit: Sum of edit scores, and number of recordings.
    """

    frames: Float[np.ndarray, "2"]
    segments: Float[np.ndarray, "3 3"]
    shared: Float[np.ndarray, "c 2"]
    edit: Float[np.ndarray, "2"]

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in self._pairs(other)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(mine - theirs for mine, theirs in self._pairs(other)))

    def _pairs(self, other: "Counts") -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        return [*zip(vars(self).values(), vars(other).values(), strict=True)]

    def scores(self) -> dict[str, float]:
        """Return MoF, F1, mIoU and edit, in [0, 1].

        MoF: share of right frames. F1@k: of the segments of all recordings; a predicted one is right if its
        IoU with the true one of its action that it overlaps most is k% or more, and that one is free (Lea et
        al. 2017, arXiv:1611.05267). mIoU: mean over true actions of the frames that have it in both by those
        that have it in one or both. edit: mean over recordings of 1 - Levenshtein distance of the two orders
        of actions by the longer one (also Lea et al.).
        """
        right, superfluous, missed = self.segments.T
        f1 = 2 * right / np.maximum(2 * right + superfluous + missed, 1)
        seen = self.shared[:, 1] > 0
        return {
            "MoF": float(self.frames[0] / self.frames[1]),
            **{f"F1@{round(100 * overlap)}": float(each) for overlap, each in zip(OVERLAPS, f1, strict=True)},
            "mIoU": float((self.shared[seen, 0] / self.shared[seen, 1]).mean()),
            "edit": float(self.edit[0] / self.edit[1]),
        }


def match(predicted: Int[np.ndarray, " n"], truth: Int[np.ndarray, " n"]) -> dict[int, int]:
    """Return a true action for each predicted one, so that most frames are right (Hungarian matching)."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn; imported where it is used

    table = np.zeros((predicted.max() + 1, truth.max() + 1), np.int64)
    np.add.at(table, (predicted, truth), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def rename(predicted: Int[np.ndarray, " n"], names: dict[int, int]) -> Ints:
    """Return the true action of each frame's predicted one, -1 where none is matched."""
    table = np.array([names.get(action, -1) for action in range(int(predicted.max()) + 1)])
    return np.asarray(table[predicted])


def count_recording(named: Int[np.ndarray, " n"], truth: Int[np.ndarray, " n"], actions: int) -> Counts:
    """Compare the actions of one recording, -1 being none, with the true ones."""
    found, real = runs(named), runs(truth)
    shared = [
        [np.sum((named == action) & (truth == action)), np.sum((named == action) | (truth == action))]
        for action in range(actions)
    ]
    orders = [label for label, _, _ in found], [label for label, _, _ in real]
    edit = 1 - _edits(*orders) / max(map(len, orders))
    return Counts(
        np.array([np.sum(named == truth), len(truth)], float),
        np.array([_found(found, real, overlap) for overlap in OVERLAPS], float),
        np.array(shared, float),
        np.array([edit, 1.0]),
    )


def runs(labels: Int[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
    """Return label, start and end (exclusive) of each run of equal labels."""
    cuts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [(int(labels[start]), start, end) for start, end in itertools.pairwise(cuts)]


def _found(
    found: Sequence[tuple[int, int, int]], real: Sequence[tuple[int, int, int]], overlap: float
) -> tuple[int, int, int]:
    taken: set[int] = set()
    for label, start, end in found:
        ious = [
            max(0, min(end, stop) - max(start, begin)) / (max(end, stop) - min(start, begin))
            if name == label
            else -1
            for name, begin, stop in real
        ]
        best = int(np.argmax(ious))
        if ious[best] >= overlap:
            taken.add(best)
    return len(taken), len(found) - len(taken), len(real) - len(taken)


def _edits(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the Levenshtein distance."""
    row: list[int] = [*range(len(other) + 1)]
    for at, mine in enumerate(one, start=1):
        above, row[0] = row[0], at
        for column, theirs in enumerate(other, start=1):
            above, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, above + int(mine != theirs)),
            )
    return row[-1]


def score_actions(
    predicted: Int[np.ndarray, " n"],
    truth: Int[np.ndarray, " n"],
    starts: Int[np.ndarray, " v"],
    *,
    each: bool,
) -> list[Line]:
    """Return the scores, with 95% intervals by the jackknife over recordings.

    Args:
        predicted: Action of each frame, one recording after the other.
        truth: True action of each frame.
        starts: First row of each recording, and the number of frames at the end.
        each: Whether actions are matched anew for each recording, which is easier; else once over the set.
    """
    actions, names = int(truth.max()) + 1, match(predicted, truth)
    counts = []
    for start, end in itertools.pairwise(starts.tolist()):
        mine, real = predicted[start:end], truth[start:end]
        counts.append(count_recording(rename(mine, match(mine, real) if each else names), real, actions))
    total = sum(counts[1:], counts[0])
    without = [(total - one).scores() for one in counts] if len(counts) > 1 else []
    return [_line(name, value, [other[name] for other in without]) for name, value in total.scores().items()]


def _line(name: str, value: float, without: list[float]) -> Line:
    """Return a score with its pseudo-values, moved so that their mean is the score."""
    left = torch.tensor(without or [value], dtype=torch.float64)
    pseudo = value - (len(left) - 1) * (left - left.mean())
    low, high = t_interval(pseudo)
    kind = f"jackknife over {len(left)} recordings"
    return Line(name, value, max(low, 0.0), min(high, 1.0), kind, pseudo.float()[None])

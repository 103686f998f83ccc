"""Say in one sentence whether pretraining was worth it, from scores beside those of the baselines."""

from dataclasses import dataclass
from typing import Any

WORTH, IN_PART, NOT_YET, UNKNOWN = "worth it", "worth it in part", "not worth it yet", "not known"
"""The answers."""

_NAMES = {
    "encoder": "ours",
    "raw_pixels": "raw pixels",
    "random_encoder": "the random encoder",
    "starting_weights": "the weights it started from",
    "single_frame": "ours on one frame",
    "shuffled_frames": "ours on shuffled frames",
}

_DECISIVE = ("linear probe", "10 labels a class")
"""Names of rows: the encoder must be ahead in one of them to be worth it."""

CONTROLS = ("single_frame", "shuffled_frames")
"""The same encoder on less of a video: what time adds to it, and no rivals."""

_STANDS = {
    "ahead": "ahead of {0}",
    "level": "level with the best of {1}",
    "behind": "behind",
    "full": "a baseline at 100% leaves nothing to gain",
}
"""Words for how the encoder stands, by ``_group``."""

_VAGUE = 0.1
"""Reach of a gain's interval, on either side, beyond which it says nothing."""

_LONGER = "train longer under another run.name (schedule.minutes or schedule.epochs)"
_ORDER = (
    "If the order of frames matters, use a head that sees it (encoder.temporal=nuta or attention) with "
    "objective.own_negatives=shuffle, and train longer"
)
_UNTRAINED = (
    f"{_LONGER.capitalize()}; if colours tell the classes apart, keep them (augment.view_1.hue=0 "
    "augment.view_1.grayscale=0); if the two views of an image in views.png do not show the same thing, "
    "soften them (augment.view_1.crop_scale, augment.view_1.jitter); if the report warns of a rising loss or "
    "a collapse, lower optimizer.base_lr"
)
_ADVICE = {
    "raw_pixels": _UNTRAINED,
    "random_encoder": _UNTRAINED,
    "starting_weights": "Training loses what these weights know: lower optimizer.base_lr, or train for less "
    "(schedule.minutes or schedule.epochs), under another run.name",
}
_ADVICE_OTHERS = "Start from such weights (encoder.weights); if the run did, lower optimizer.base_lr"
"""Advice for each baseline that is not beaten, by its name."""

_NO_CLASSES = (
    "No network is seen to beat always naming the largest class ({:.1f}%), so these images may not show "
    "their class: if the folders are no classes, train with data.name=images under another run.name."
)

_SORT = (
    "For that, sort images that it was not trained on, 50 or more a class, into one folder a class and "
    "evaluate with data.name=imagefolder data.root=DIR."
)


@dataclass(frozen=True)
class Verdict:
    """An answer, and the sentence that gives it with its numbers.

    Attributes:
        answer: ``WORTH``, ``IN_PART``, ``NOT_YET`` or ``UNKNOWN``.
        sentence: One or two sentences; the first begins with the answer.
    """

    answer: str
    sentence: str


def title(name: str) -> str:
    """Return the words for a network that is compared."""
    return _NAMES.get(name, name)


def judge(rows: list[dict[str, Any]], largest: float | None = None, pretrained: str = "") -> Verdict:
    """Compare the encoder with the best baseline of each row of ``eval.protocol.compare``.

    It is ahead if it gains over every baseline, with a 95% interval above 0; behind if the interval of one
    of its gains is below 0; otherwise level. Where a baseline has 100%, nothing can be gained.

    Worth it: ahead on the linear probe at all labels or at 10 labels a class, and behind nowhere. In part:
    ahead somewhere, and in at least as many rows as behind. Not known: nothing can be gained anywhere, or
    every row is level and its interval wide. Else not worth it yet. The advice is about the row that is
    furthest behind, or if none is, level; where no network is above always naming the largest class, about
    the classes. The encoder on less of a video is told of apart.

    Args:
        rows: Those of ``eval.protocol.compare``.
        largest: Share of the test images that are of the largest class; None if it is not known.
        pretrained: How many test images were pretrained on; empty if none.
    """
    groups: dict[str, list[dict[str, Any]]] = {"ahead": [], "level": [], "behind": [], "full": []}
    for row in rows:
        groups[_group(row)].append(row)
    ahead, level, behind, full = groups.values()
    everything = _listed([title(name) for name in _baselines(rows[0])])
    starts = {
        group: words.format(everything, "them" if ahead else everything) for group, words in _STANDS.items()
    }
    parts = [
        f"{starts[group]} on {len(found)} of {len(rows)}: {_listed([_gain(row) for row in found])}"
        for group, found in groups.items()
        if found
    ]
    vague = not ahead and not behind and (not level or any(_is_vague(row) for row in level if _decides(row)))
    if vague:  # also where every row is full
        answer = UNKNOWN
    elif any(map(_decides, ahead)) and not any(map(_is_behind, rows)):
        answer = WORTH
    else:
        answer = IN_PART if ahead and len(ahead) >= len(behind) else NOT_YET
    advice = "" if answer == WORTH else _advice(behind or level, full)
    if vague and level:
        advice = "There are too few test images to tell: label more."
    elif largest is not None and all(_is_at_most(row, largest) for row in rows):
        advice = _NO_CLASSES.format(100 * largest)
    numbers = "Numbers are points of accuracy that ours gains over the best baseline."
    trained_on = f"Not of unseen images: {pretrained}." if pretrained else ""
    first = f"{answer.capitalize()}: {'; '.join(parts)}."
    said = [first, trained_on, numbers, advice, _what_time_adds(rows[0])]
    return Verdict(answer, " ".join(filter(None, said)))


def judge_row(row: dict[str, Any]) -> str:
    """Say in a sentence how the encoder stands in one row, as in ``judge``; empty without baselines."""
    baselines = _baselines(row)
    if not baselines:
        return ""
    everything = _listed([title(name) for name in baselines])
    group = "behind" if _is_behind(row) else _group(row)
    stands = _STANDS[group].format(everything, everything)
    if group == "behind":
        stands += f" {title(_rival(row))}"
    elif group == "level" and _is_vague(row):
        stands = "too few to tell"
    gains = []
    for name, each in baselines.items():
        value, low, high = (f"{100 * each['gain'][end]:+.1f}" for end in ("value", "low", "high"))
        gains.append(f"{value} ({low} to {high}) over {title(name)}")
    return f"{row['name']}: {stands}; in points, with 95% intervals, ours gains {_listed(gains)}."


def _what_time_adds(row: dict[str, Any]) -> str:
    """Say what an encoder of videos gains over itself on less of them; empty for images."""
    gains = {title(name): row[name]["gain"] for name in CONTROLS if name in row}
    if not gains:
        return ""
    each = _listed([f"{100 * gain['value']:+.1f} over {name}" for name, gain in gains.items()])
    advice = "" if all(gain["low"] > 0 for gain in gains.values()) else f" {_ORDER}."
    return f"Time adds to its {row['name']}: {each}.{advice}"


def _gain(row: dict[str, Any]) -> str:
    """Name a row with the gain over the best baseline, and that baseline where the gain is not clear."""
    rival, group = _rival(row), _group(row)
    against = f" against {title(rival)}" if group in ("behind", "full") else ""
    return f"{row['name']} ({100 * row[rival]['gain']['value']:+.1f}{against})"


def _advice(beatable: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    """Return what to change for the row that trails a baseline most, or what to compare instead."""
    if beatable:
        row = min(beatable, key=lambda each: each[_rival(each)]["gain"]["value"])
        return f"{_ADVICE.get(_rival(row), _ADVICE_OTHERS)}."
    if full:
        return "Compare on images where the baselines err."
    return "More labelled images, more than 10 a class, would tell more."


def judge_without_labels(
    scores: dict[str, dict[str, Any]], images: int, labels: str = "", own: bool = True
) -> Verdict:
    """Judge by what needs no labels, which can show that training failed, not that it was worth it.

    The share of second views that are found is no measure of use: it falls with the number of images
    and where they are much alike, and an encoder that ignores what the views change may find fewer than raw
    pixels do.

    Args:
        scores: By network: ``retrieval``, the share of images whose second view is found, its ``gain``
            (of ours over this network) with ``gain_low`` and ``gain_high``, ``rankme``, ``dimensions``, and
            the encoder's ``verdict``.
        images: Number of images that a view was looked up in.
        labels: Sentence on how to have labels of these images; empty if nothing is known of any.
        own: Whether the run was trained on these images; if not, a collapse may be due to them.
    """
    ours, others = scores["encoder"], {name: each for name, each in scores.items() if name != "encoder"}
    rank = f"effective rank {ours['rankme']:.1f} of {ours['dimensions']}"
    beside = ", ".join(f"{title(name)} {100 * each['retrieval']:.1f}%" for name, each in others.items())
    found = f"{100 * ours['retrieval']:.1f}% of the second views are found among {images} images ({beside})"
    if ours["verdict"] != "healthy":
        answer, advice = UNKNOWN, "These images are not the run's own: they may be unlike any that it knows."
        if own:
            answer = NOT_YET
            advice = "Lower optimizer.base_lr, raise objective.temperature, or give the loss more negatives."
        said = [f"{answer.capitalize()}: {ours['verdict']} of the features, {rank}; {found}.", advice, labels]
        return Verdict(answer, " ".join(filter(None, said)))
    worst = min(others, key=lambda name: others[name]["gain"])
    if others[worst]["retrieval"] >= 1:
        shown = f"nothing is left to gain over {title(worst)}"
    elif others[worst]["gain_low"] > 0:
        shown = f"training taught it to recognise an image better than {title(worst)} does"
    else:
        shown = f"it recognises an image no better than {title(worst)}"
    return Verdict(
        UNKNOWN,
        f"{UNKNOWN.capitalize()} without labels: {found} and the features are healthy, {rank}. So {shown}; "
        "images that are much alike are hard to find for any network, and whether the features tell your "
        f"classes apart, it cannot say. {labels or _SORT}",
    )


def _listed(names: list[str]) -> str:
    """Join names as in a sentence: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _baselines(row: dict[str, Any]) -> dict[str, Any]:
    ours = ("encoder", *CONTROLS)
    return {name: each for name, each in row.items() if isinstance(each, dict) and name not in ours}


def _decides(row: dict[str, Any]) -> bool:
    return row["name"] in _DECISIVE


def _is_vague(row: dict[str, Any]) -> bool:
    """Return whether the gains that are not above 0 have intervals that are too wide to say so."""
    gains = [each["gain"] for each in _baselines(row).values()]
    return all(gain["low"] > 0 or gain["high"] - gain["low"] > 2 * _VAGUE for gain in gains)


def _is_at_most(row: dict[str, Any], share: float) -> bool:
    """Return whether no network's accuracy has an interval above ``share``."""
    return all(each["low"] <= share for each in (row["encoder"], *_baselines(row).values()))


def _group(row: dict[str, Any]) -> str:
    """Return how the encoder stands: ``full`` if a baseline has 100%, ``ahead``, ``behind`` or ``level``."""
    baselines = _baselines(row).values()
    if any(each["value"] >= 1 for each in baselines):
        return "full"
    if all(each["gain"]["low"] > 0 for each in baselines):
        return "ahead"
    return "behind" if _is_behind(row) else "level"


def _is_behind(row: dict[str, Any]) -> bool:
    return any(each["gain"]["high"] < 0 for each in _baselines(row).values())


def _rival(row: dict[str, Any]) -> str:
    """Return the baseline over which the encoder gains least: surely, where it is behind one."""
    baselines, end = _baselines(row), "high" if _is_behind(row) else "value"
    return min(baselines, key=lambda name: baselines[name]["gain"][end])

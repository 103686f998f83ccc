"""Decide the settings that are not stated, and say why: a pure function of what was seen."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from contrastive.choosing.known import Known
from contrastive.choosing.look import Folder
from contrastive.choosing.machine import Machine
from contrastive.choosing.rules import RULES
from contrastive.encoders.spec import ArchSpec

_SOME = 0.1  # share of the images from which on they are remarked on


@dataclass(frozen=True)
class Decision:
    """A value chosen for a setting.

    Attributes:
        key: Dotted name of the setting.
        value: Its value.
        reason: Why, in a few words: what was seen.
        more: The rule and the alternatives, for ``--explain``.
    """

    key: str
    value: Any
    reason: str
    more: str

    def __str__(self) -> str:
        """Return ``key=value``, as typed on the command line."""
        typed = f"[{','.join(map(str, self.value))}]" if isinstance(self.value, list) else self.value
        return f"{self.key}={typed}"


def decide(
    folder: Folder,
    machine: Machine,
    settings: Mapping[str, Any],
    stated: Collection[str],
    network: ArchSpec | None = None,
) -> list[Decision]:
    """Decide every setting of ``RULES`` that is not stated.

    Args:
        folder: What the images are like.
        machine: What trains.
        settings: Every setting by dotted name: stated ones, and defaults.
        stated: Names of the stated ones; they are left alone.
        network: What ``encoder.weights`` says of its network; None if it says nothing.

    Returns:
        The decisions in the order of ``RULES``; a setting whose default stays has none.

    Raises:
        UserError: too few images.
    """
    settled, decisions = dict(settings), []
    for key, rule in RULES.items():
        choice = None if key in stated else rule(Known(folder, machine, settled, stated, network))
        if choice is not None:
            settled[key] = choice.value
            decisions.append(Decision(key, choice.value, choice.reason, choice.more))
    return decisions


def remarks(folder: Folder, settings: Mapping[str, Any], given: Collection[str] = ()) -> list[str]:
    """Describe what was seen that no setting is chosen by, and what to state if it matters.

    Args:
        folder: What the images are like.
        settings: Every setting by dotted name.
        given: Names of those that the user gives, beside the recipe: nothing is said of them.
    """
    return [*_of_depth(folder), *_of_fourth_band(folder), *_of_views(folder, settings, given)]


def _of_depth(folder: Folder) -> list[str]:
    """Describe grey files of fewer bits than others."""
    if folder.dark < _SOME:
        return []
    bits = folder.white_of_dark.bit_length()
    return [
        f"{folder.dark:.0%} of the 16-bit images have values of only {bits} bits, nearly black where "
        f"{folder.white} is white; save all with the same bits, or add data.white={folder.white_of_dark}, "
        "from which on all values are white"
    ]


def _of_fourth_band(folder: Folder) -> list[str]:
    """Describe transparency that looks like a fourth band."""
    if folder.fourth_band < _SOME:
        return []
    return [
        f"{folder.fourth_band:.0%} of the images have a fourth channel that looks like a picture, and is "
        "taken for transparency; if it is none (near infrared, a fourth stain), save three channels"
    ]


def _of_views(folder: Folder, settings: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Describe how views differ.

    Flips and colour changes stay: pixels do not show whether left and right, or colours, carry meaning. Of
    writing too: where paper and ink differ from scan to scan, the views of ``augment=digits``, which keep the
    brightness, match by it alone.
    """
    prefix = "augment.view_1."
    view = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    decided = {key.removeprefix(prefix) for key in given if key.startswith(prefix)}
    motions = {"rotate", "translate", "shear"}
    mirrored = view["flip"] and "flip" not in decided
    coloured = (
        folder.grey <= 0.9
        and (view["jitter"] or view["grayscale"])
        and not {"jitter", "hue", "grayscale"} & decided
    )
    advice = ["if left and right carry meaning, add augment.view_1.flip=0"] if mirrored else []
    if folder.two_valued > 0.5:
        seen = f"{folder.two_valued:.0%} of the images have two brightnesses, as writing has"
        if not motions & decided and not any(view[name] for name in motions):
            advice.append(
                "for written characters, add small motions: augment.view_1.rotate=15 "
                "augment.view_1.translate=0.1 augment.view_1.shear=10"
            )
    else:
        seen = "views " + " and ".join(
            ["differ in colour"] * bool(coloured) + ["are mirrored"] * bool(mirrored)
        )
        if coloured:
            advice.insert(0, "if colours carry meaning, add augment.view_1.hue=0 augment.view_1.grayscale=0")
    follows = all(value == settings[f"augment.view_2.{name}"] for name, value in view.items())
    return ["; ".join([seen, *advice]) + " (view_2 follows)" * follows] if advice else []

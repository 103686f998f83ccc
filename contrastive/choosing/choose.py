"""Fill in the settings that are not stated: from images and machine, or from the run that is continued."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from contrastive.choosing.decide import decide, remarks
from contrastive.choosing.look import look_at_folder
from contrastive.choosing.machine import look_at_machine
from contrastive.choosing.rules import RULES, run_name
from contrastive.config import UNTIL_CHOSEN, PretrainConfig, UserError
from contrastive.config_files import Stated, flat, load_saved, read_stated
from contrastive.encoders.weights import described_network
from contrastive.run_dir import is_begun
from contrastive.slurm import is_first_task

logger = logging.getLogger(__name__)

_VIDEOS = ("clips", "moving_digits")
"""Sources that no rule knows."""

_SHOWN = {
    "run.name",
    "data.name",
    "data.image_size",
    "data.white",
    "data.global_batch",
    "schedule.minutes",
    "encoder.name",
    "method",
}
"""Settings whose choice is said also without ``--explain``: those that a user may want to state."""


def choose_config(overrides: Sequence[str], recipe: str = "own", *, explain: bool = False) -> PretrainConfig:
    """Load a recipe with overrides, and choose the settings that neither states.

    The result is the config of ``contrastive-pretrain --config own data.root=DIR ...``; pass it to
    ``pretrain``.

    Args:
        overrides: As on the command line; ``data.root=DIR`` is needed.
        recipe: Name or file of a recipe with ``choose: true``.
        explain: Log every choice, what was seen and the rules.

    Raises:
        UserError: wrong settings; a folder that is missing, or that has no image or too few.
    """
    return choose(read_stated(PretrainConfig, "pretrain", recipe, overrides), explain=explain)


def choose(stated: Stated[PretrainConfig], *, explain: bool = False) -> PretrainConfig:
    """Choose the settings that are not stated; log the main ones with their reasons, and keep all.

    An unfinished run of the same name is continued with what was chosen when it began: nothing is looked at.

    Args:
        stated: What recipe and command line state.
        explain: Log every choice, what was seen and the rules; of a run that has begun, what was chosen then.

    Returns:
        A config with ``choose=False``: read again, it chooses nothing.

    Raises:
        UserError: see ``choose_config``.
    """
    given = stated.config(UNTIL_CHOSEN)
    chosen = _chosen_before(given, stated, explain=explain)
    if chosen is None:
        chosen = _look_and_decide(given, stated, explain=explain)
    return replace(stated.config(chosen), choose=False)


def _chosen_before(
    given: PretrainConfig, stated: Stated[PretrainConfig], *, explain: bool
) -> dict[str, Any] | None:
    """Return what was chosen for the run that is continued; None if there is none."""
    if not given.data.root:
        raise UserError("data.root is not set: settings are chosen for your images; add data.root=FOLDER")
    name = given.run.name if "run.name" in stated.keys else run_name(given.data.root)
    run_dir = Path(given.run.root) / name
    if not ((run_dir / "config.yaml").is_file() and is_begun(run_dir)):
        return None
    saved = flat(asdict(load_saved(PretrainConfig, run_dir / "config.yaml")))
    if not saved["chosen"]:  # of another recipe
        return None
    _say(f"{run_dir}: has begun; what was chosen then is kept, and the images are not looked at again")
    for line in saved["chosen"] if explain else ():
        _say(f"  {line}")
    kept = {*RULES, "chosen"}
    groups = tuple(f"{name}." for name in kept)  # of encoder.args, saved has the names below it
    return {key: value for key, value in saved.items() if key in kept or key.startswith(groups)}


def _look_and_decide(
    given: PretrainConfig, stated: Stated[PretrainConfig], *, explain: bool
) -> dict[str, Any]:
    if given.data.name in _VIDEOS:
        raise UserError(
            f"choose=true looks at images, and data.name={given.data.name} has videos; use "
            f"--config {given.data.name}, whose settings are a start, with choose=false"
        )
    folder = look_at_folder(given.data, stated.keys)
    machine = look_at_machine(given.trainer.get("accelerator", "auto"))
    settings = flat(asdict(given))
    network = described_network(given.encoder.weights)
    decisions = decide(folder, machine, settings, stated.keys, network)
    _say(f"{folder.root}: {folder}")
    if explain:
        _say(f"machine: {machine}")
    chosen = []
    for (reason, more), group in groupby(decisions, lambda decision: (decision.reason, decision.more)):
        made = list(group)
        chosen.append(f"{' '.join(map(str, made))}: {reason}")
        if explain or not _SHOWN.isdisjoint(decision.key for decision in made):
            _say(f"  {chosen[-1]}")
        if explain and more:
            _say(f"      {more}")
    if not explain:
        _say("  the others, with reasons, rules and alternatives: --explain")
    for line in remarks(folder, settings, stated.given):
        _say(f"you decide: {line}")
    return {"chosen": chosen} | {decision.key: decision.value for decision in decisions}


def _say(line: str) -> None:
    if is_first_task():
        logger.info("%s", line)

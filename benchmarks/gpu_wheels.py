"""List the packages to carry to a machine without a network, from setup.cfg and what is installed here."""

import configparser
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SETUP = Path(__file__).parents[1] / "setup.cfg"
BASE = ("torch", "torchvision", "pytorch-lightning", "scikit-learn", "matplotlib", "timm", "safetensors")
"""Packages that the machine has, with all that they need."""

OPTIONAL = ("wandb", "rich")
"""Required by setup.cfg, and imported only by a run that logs to W&B or draws a progress bar."""


class Wheel(NamedTuple):
    """A package to carry: what needs it, its version here, and its MiB when installed, thrice a wheel's."""

    name: str
    needed_by: str
    version: str
    size_mib: float


def listing() -> str:
    """Return a table of the packages to carry, and the commands that fetch and install them."""
    required = _required()
    needed = wheels([text for text in required if Requirement(text).name not in OPTIONAL])
    others = [one for one in wheels(required) if one.name not in {each.name for each in needed}]
    return "\n".join(
        [
            f"To carry beside {', '.join(BASE)}:",
            *_table(needed),
            "",
            f"Only for {' and '.join(OPTIONAL)}, which nothing imports while the table is measured:",
            *_table(others),
            "",
            "With a network, the same Python and system:",
            f"  python -m pip wheel --no-deps --wheel-dir wheels {_pinned(needed)}",
            "Without one:",
            "  python -m pip install --no-index --no-deps wheels/*.whl",
            "lightly's arm of step-* is left out unless lightly is carried too (pip install '.[bench]').",
        ]
    )


def _table(found: Sequence[Wheel]) -> list[str]:
    lines = [f"{one.name:40} {one.version:18} {one.size_mib:6.1f}  {one.needed_by}" for one in found]
    together = f"{'together':59} {sum(one.size_mib for one in found):6.1f}"
    return [f"{'package':40} {'version':18} {'MiB':>6}  needed by", *lines, together]


def _pinned(found: Sequence[Wheel]) -> str:
    return " ".join(f"{one.name}=={one.version}" for one in found)


def wheels(required: Iterable[str], base: Iterable[str] = BASE) -> list[Wheel]:
    """Return what ``required`` needs, directly or through others, and ``base`` does not."""
    there = _closure(base, "the machine")
    wanted = _closure(required, "contrastive-pretrain")
    return [_wheel(name, parent) for name, parent in sorted(wanted.items()) if name not in there]


def _required() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(SETUP)
    return parser["options"]["install_requires"].split("\n")[1:]


def _closure(requirements: Iterable[str], parent: str) -> dict[str, str]:
    """Return all packages that must be installed, each with the first one that needs it."""
    found: dict[str, str] = {}
    waiting = [(text, parent) for text in requirements]
    while waiting:
        text, needed_by = waiting.pop(0)
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or not applies:
            continue
        found[name] = needed_by
        waiting += [(each, name) for each in _needs(name)]
    return found


def _needs(name: str) -> list[str]:
    """Return the requirements of a package; none if it is not installed here."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _wheel(name: str, parent: str) -> Wheel:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here, so its size is unknown; run pip install .") from None
    places = [Path(str(package.locate_file(file))) for file in package.files or ()]
    size = sum(place.stat().st_size for place in places if place.is_file())
    return Wheel(name, parent, package.version, size / 2**20)

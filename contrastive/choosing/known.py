"""Define what a rule may look at, and what it returns."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from contrastive.choosing.look import Folder
from contrastive.choosing.machine import Machine
from contrastive.encoders.spec import ArchSpec


@dataclass(frozen=True)
class Choice:
    """A value for one setting.

    Attributes:
        value: Of the setting.
        reason: Why, in a few words: what was seen.
        more: The rule and the alternatives, for ``--explain``.
    """

    value: Any
    reason: str
    more: str = ""


@dataclass(frozen=True)
class Known:
    """Hold what a rule may look at; ``known["data.image_size"]`` is a setting's value.

    Attributes:
        folder: The images.
        machine: The device.
        settings: Every setting by dotted name: stated, or settled by an earlier rule, or its default.
        stated: Names of those that are stated.
        network: What ``encoder.weights`` says of its network; None if it says nothing.
    """

    folder: Folder
    machine: Machine
    settings: Mapping[str, Any]
    stated: Collection[str]
    network: ArchSpec | None = None

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    @property
    def published(self) -> bool:
        """Return whether training starts from the weights of a network that the user names: a library's."""
        given = self["encoder.weights"] is not None and "encoder.name" in self.stated
        return given and self.network is None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, at least 1."""
        return max(1, self.folder.num_images // int(self["data.global_batch"]))


Rule = Callable[[Known], Choice | None]
"""Chooses one setting; None leaves its default."""

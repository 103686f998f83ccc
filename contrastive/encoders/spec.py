"""What describes a network and its input, in config objects and in the metadata of encoder files."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from contrastive.config import DataConfig

OWN = "own:"
"""Begins the name of a network that only the program that defines it can build."""


@dataclass(frozen=True)
class ArchSpec:
    """Describes a network: everything that is needed to build it again, except its weights.

    Attributes:
        name: As ``encoder.name``; ``own:CLASS`` for a network that no registry entry builds.
        args: Arguments of the function that the registry names, as JSON has them.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Describe it in words: ``resnet18, width 64, stem small``."""
        return ", ".join([self.name, *(f"{name} {value}" for name, value in self.args.items())])

    @property
    def is_own(self) -> bool:
        """Whether only the program that defines the network can build it."""
        return self.name.startswith(OWN)

    def to_json(self) -> str:
        """Write it as one line.

        Raises:
            ValueError: an argument that JSON does not have.
        """
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except TypeError as error:
            raise ValueError(f"{self}: arguments are numbers, text, lists and mappings ({error})") from error

    @classmethod
    def from_json(cls, text: str) -> "ArchSpec":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: anything else.
        """
        values = _fields(text, cls)
        if not isinstance(values["name"], str) or not isinstance(values["args"], dict):
            raise ValueError(f"{text!r:.80}: a name and a mapping of arguments are needed")
        return cls(**values)


@dataclass(frozen=True)
class InputSpec:
    """Describes what an encoder takes: the images it was trained on, and how they are normalised.

    Attributes:
        size: Side in pixels of the square the network sees.
        decode_size: Side of the square that is cut from.
        mean: Per-channel mean to subtract, in [0, 1] units.
        std: Per-channel standard deviation to divide by.
        frames: Images of a clip; 1 for single images.
    """

    size: int
    decode_size: int
    mean: list[float]
    std: list[float]
    frames: int = 1

    @classmethod
    def of(cls, data: DataConfig) -> "InputSpec":
        """Return what a run with these settings feeds its network."""
        return cls(data.image_size, data.stored_size, [*data.mean], [*data.std])

    def at(self, size: int | None) -> "InputSpec":
        """Return the same at another size, stored as ``data.decode_size=null`` does; None changes nothing."""
        if size in (None, self.size):
            return self
        return self.of(DataConfig(image_size=size, mean=self.mean, std=self.std))

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "InputSpec":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: anything else, or a value that no run can have.
        """
        values = _fields(text, cls)
        if not all(type(values[name]) is int for name in ("size", "decode_size", "frames")):
            raise ValueError(f"{text!r:.80}: size, decode_size and frames are whole numbers")
        if values["frames"] != 1:
            raise ValueError(f"frames={values['frames']}: this release reads encoders of single images")
        mean, std = numbers(values["mean"]), numbers(values["std"])
        return cls.of(
            DataConfig(image_size=values["size"], decode_size=values["decode_size"], mean=mean, std=std)
        )


def numbers(values: Any) -> list[float]:
    """Return a list of numbers as floats.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{values!r:.80} is not a list of numbers")
    return [float(value) for value in values]


def _fields(text: str, kind: type) -> dict[str, Any]:
    """Read a JSON object that has exactly the fields of a dataclass."""
    values = json.loads(text)
    names = [*kind.__dataclass_fields__]  # type: ignore[attr-defined]  # of every dataclass
    if not isinstance(values, dict) or {*values} != {*names}:
        raise ValueError(f"{text!r:.80}: an object of {', '.join(names)} is needed")
    return values

"""Describe a network (ArchSpec) and its input (InputSpec), also in the metadata of encoder files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from contrastive.config import WHITE, DataConfig

OWN = "own:"
"""Prefix of the name of a network that only the program that defines it can build."""


@dataclass(frozen=True)
class ArchSpec:
    """Everything that is needed to rebuild a network, except its weights.

    Attributes:
        name: The ``encoder.name``; ``own:CLASS`` for a network that no registry entry builds.
        args: Arguments of the registry's function, as JSON values.
        temporal: The ``encoder.temporal`` that joins the features of a clip's frames; empty for images, and
            for networks that take clips themselves.
        temporal_args: Arguments of that head.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    temporal: str = ""
    temporal_args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Describe it in words: ``resnet18, width 64, stem small, under mean``."""
        head = [f"under {self.temporal}", *_words(self.temporal_args)] if self.temporal else []
        return ", ".join([self.name, *_words(self.args), *head])

    @property
    def is_own(self) -> bool:
        """Return whether only the program that defines the network can build it."""
        return self.name.startswith(OWN)

    def to_json(self) -> str:
        """Write the spec as one line of JSON.

        Raises:
            ValueError: an argument that JSON cannot represent.
        """
        values = asdict(self)
        if not self.temporal:  # as files were before there were heads, so that releases of before read them
            del values["temporal"], values["temporal_args"]
        try:
            return json.dumps(values, allow_nan=False)
        except TypeError as error:
            raise ValueError(f"{self}: arguments are numbers, text, lists and mappings ({error})") from error

    @classmethod
    def from_json(cls, text: str) -> "ArchSpec":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: anything else.
        """
        values = _fields(text, cls, {"temporal": "", "temporal_args": {}})
        names, args = ("name", "temporal"), ("args", "temporal_args")
        if not all(isinstance(values[name], str) for name in names) or not all(
            isinstance(values[name], dict) for name in args
        ):
            raise ValueError(f"{text!r:.80}: a name and a mapping of arguments are needed")
        return cls(**values)


@dataclass(frozen=True)
class InputSpec:
    """The input of an encoder: size of the images it was trained on, and their normalisation.

    Attributes:
        size: Side in pixels of the square the network sees.
        decode_size: Side of the stored square that views are cut from.
        mean: Per-channel mean to subtract, in [0, 1] units.
        std: Per-channel standard deviation to divide by.
        frames: Images of a clip; 1 for single images.
        white: Value that is white in grey files of more than 8 bits.
    """

    size: int
    decode_size: int
    mean: list[float]
    std: list[float]
    frames: int = 1
    white: int = WHITE

    @classmethod
    def of(cls, data: DataConfig) -> "InputSpec":
        """Return the input of the network of a run with these settings."""
        return cls(data.image_size, data.stored_size, [*data.mean], [*data.std], data.frames, data.white)

    @property
    def data(self) -> DataConfig:
        """Return these settings as those of data, for ``contrastive.augment.views.center_view``."""
        return DataConfig(
            image_size=self.size,
            decode_size=self.decode_size,
            mean=self.mean,
            std=self.std,
            frames=self.frames,
            white=self.white,
        )

    def at(self, size: int | None) -> "InputSpec":
        """Return the same input at another size, with the default decode size; None changes nothing."""
        if size in (None, self.size):
            return self
        return self.of(replace(self.data, image_size=size, decode_size=None))

    def to_json(self) -> str:
        """Write the spec as one line of JSON."""
        values = asdict(self)
        if self.white == WHITE:  # as files were before it could be set, so that releases of before read them
            del values["white"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "InputSpec":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: anything else, or a value that no run can have.
        """
        values = _fields(text, cls, {"white": WHITE})
        if not all(type(values[name]) is int for name in ("size", "decode_size", "frames", "white")):
            raise ValueError(f"{text!r:.80}: size, decode_size, frames and white are whole numbers")
        spec = cls(**values | {name: numbers(values[name]) for name in ("mean", "std")})
        return cls.of(spec.data)


def numbers(values: Any) -> list[float]:
    """Return a list of numbers as floats.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{values!r:.80} is not a list of numbers")
    return [float(value) for value in values]


def _words(args: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in args.items()]


def _fields(text: str, kind: type, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object with exactly the fields of a dataclass; those that have a default may be missing."""
    values = json.loads(text)
    names = [*kind.__dataclass_fields__]  # type: ignore[attr-defined]  # of every dataclass
    if not isinstance(values, dict) or {*values, *defaults} != {*names}:
        needed = [name for name in names if name not in defaults]
        raise ValueError(f"{text!r:.80}: an object of {', '.join(needed)} is needed")
    return dict(defaults) | values

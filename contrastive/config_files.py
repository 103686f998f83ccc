"""The one way from yaml files and ``key=value`` to a checked dataclass, and back."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contrastive.config import UserError

Schema = TypeVar("Schema")

_REFUSALS = (OmegaConfBaseException, TypeError, OverflowError)
"""What OmegaConf raises on values that do not fit the schema; the checks in it raise ValueError."""


def load_config(schema: type[Schema], folder: str, recipe: str, overrides: Sequence[str]) -> Schema:
    """Compose ``recipe`` with ``overrides`` and check the result.

    A recipe is a yaml file, by path or by the name of one shipped under ``configs/<folder>``. Its
    ``defaults`` list names other recipes, or ``group/option`` files, that are merged first, in order.
    An override is ``key=value`` (``--key=value`` is the same); ``group=option`` merges
    ``configs/<folder>/<group>/<option>.yaml`` over the recipe, before all ``key=value``.

    Raises:
        UserError: unknown recipe or key, wrong type, value out of range, a bare word.
    """
    pairs = [_split_override(text) for text in overrides]
    options = [(key, value) for key, value in pairs if _is_group(schema, key)]
    layers = [_compose(folder, recipe)]
    layers += [_read(_find(f"{key}/{value}", folder), group=key) for key, value in options]
    values = [f"{key}={value}" for key, value in pairs if not _is_group(schema, key)]
    try:
        layers.append(_from_dotlist(values))
        return _checked(schema, *layers)
    except _REFUSALS as error:
        where = "" if getattr(error, "full_key", None) else f"{_culprit(schema, values) or recipe}: "
        raise UserError(where + _explain(error, schema)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def load_saved(schema: type[Schema], path: Path) -> Schema:
    """Read a resolved config.yaml from a run directory; interpolations in it are refused, not followed.

    Raises:
        UserError: missing file, not yaml, unknown key, or an interpolation.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a run directory") from error
    if "${" in text:
        raise UserError(
            f"{path}: holds an interpolation; a saved config is resolved, so this one was altered"
        )
    layer = _read(path)
    layer.pop("provenance", None)
    try:
        return _checked(schema, layer)
    except _REFUSALS as error:
        raise UserError(f"{path}: {_explain(error, schema)}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def to_yaml(config: Any) -> str:
    """The config as yaml, every default spelled out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configs of one schema differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for item in fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if is_dataclass(before):
            found |= differences(before, after, f"{prefix}{item.name}.")
        elif before != after:
            found[prefix + item.name] = (before, after)
    return found


def _checked(schema: type[Schema], *layers: DictConfig) -> Schema:
    # Resolved before the schema: OmegaConf 2.3 refuses ``view_2: ${augment.view_1}`` in a typed field.
    given = OmegaConf.merge(*layers)
    OmegaConf.resolve(given)
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    return config  # type: ignore[no-any-return]


def _culprit(schema: type, values: list[str]) -> str | None:
    """The override that the schema refuses by itself, for errors that do not say where they come from."""
    for value in values:
        try:
            OmegaConf.merge(OmegaConf.structured(schema), _from_dotlist([value]))
        except _REFUSALS:
            return value
    return None


def _from_dotlist(values: list[str]) -> DictConfig:
    merged = OmegaConf.create()
    for value in values:
        try:
            merged = _merge_open(merged, OmegaConf.from_dotlist([value]))
        except Exception as error:  # yaml raises a dozen kinds; each means the same to the user
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{value!r}: not readable as key=value ({reason}); quote text: key='\"...\"'"
            ) from error
    return merged


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise UserError(f"{text!r}: an override is key=value, e.g. schedule.epochs=10; --help lists the rest")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text!r}: not UTF-8, as settings must be; where it is a path, use a link whose name is"
        ) from error
    return key, value


def _is_group(schema: type, key: str) -> bool:
    """Whether ``key`` names a whole group, so that its value is one of the group's files."""
    groups = (
        item.name for item in fields(schema) if is_dataclass(item.type) or get_origin(item.type) is dict
    )
    return key in groups


def _compose(folder: str, recipe: str, within: tuple[Path, ...] = ()) -> DictConfig:
    path = _find(recipe, folder)
    if path in within:
        raise UserError(f"{path}: includes itself through defaults; take it out of the list")
    body = _read(path)
    merged = OmegaConf.create()
    defaults = body.pop("defaults", None)
    if not isinstance(defaults, ListConfig | None):
        raise UserError(
            f"{path}: defaults={defaults!r}: a list is needed, e.g. defaults: [cifar10, mining/band]"
        )
    for name in defaults or ():
        group, _, option = str(name).rpartition("/")
        beside = path.parent / f"{name}.yaml"
        found = beside if beside.is_file() else _find(str(name), folder)
        layer = (
            _read(found, group=group) if option and group else _compose(folder, str(found), (*within, path))
        )
        merged = _merge_open(merged, layer)
    return _merge_open(merged, body)


def _merge_open(*layers: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(*layers)
    assert isinstance(merged, DictConfig)
    return merged


def _read(path: Path, group: str = "") -> DictConfig:
    """One yaml file, as it stands, or as the content of ``group``."""
    try:
        body = OmegaConf.load(path)
    except Exception as error:  # yaml raises a dozen kinds; each means the same to the user
        raise UserError(f"{path}: not a readable yaml file ({error})") from error
    if not isinstance(body, DictConfig):
        raise UserError(f"{path}: a yaml mapping is needed, e.g. 'data:' with 'name: digits' below it")
    return OmegaConf.create({group: body}) if group else body


def _find(name: str, folder: str) -> Path:
    """A yaml file by path, or a shipped one by name."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"config {name!r}: no such file; shipped are {', '.join(recipes(folder))}")
    shipped = Path(str(resources.files("configs"))) / folder
    path = shipped / f"{name}.yaml"
    if path.is_file():
        return path
    options = sorted(file.stem for file in path.parent.glob("*.yaml"))
    if not options:
        group = path.parent.name
        raise UserError(
            f"config {name!r}: nothing is shipped for group {group!r}; set its keys, {group}.KEY=value"
        )
    raise UserError(f"config {name!r}: unknown; {nearest(path.stem, options)}")


def recipes(folder: str) -> list[str]:
    """Names of the shipped recipes of ``configs/<folder>``."""
    return sorted(file.stem for file in (Path(str(resources.files("configs"))) / folder).glob("*.yaml"))


def _keys(schema: Any, prefix: str = "") -> list[str]:
    found = []
    for item in fields(schema):
        found.append(prefix + item.name)
        if is_dataclass(item.type):
            found += _keys(item.type, f"{prefix}{item.name}.")
    return found


def _explain(error: Exception, schema: type) -> str:
    key = getattr(error, "full_key", None) or ""
    reason = str(getattr(error, "msg", None) or error).splitlines()[0]
    if key and key.partition("[")[0] not in _keys(schema):
        group = key.rpartition(".")[0]
        return f"unknown key {key!r}; " + nearest(key, _keys(schema), group)
    if "is not a ListConfig" in reason:
        reason = f"a list is needed, e.g. {key}=[1,2]"
    elif key and "DictConfig" in reason:
        reason = f"a value is needed, {key}=VALUE; there are no keys below it"
    elif "value 'None'" in reason or "is not Optional" in reason:
        reason = "nothing given, which is null in yaml; a value is needed"
    return f"{key}: {reason}" if key else reason


def nearest(given: str, allowed: Sequence[str], group: str = "") -> str:
    """The tail of an error message: the closest allowed name, and its siblings."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    siblings = [name for name in allowed if name.rpartition(".")[0] == group]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed are {', '.join(siblings)}"

"""Load yaml files and ``key=value`` overrides into a checked dataclass, and write it back as yaml."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from importlib import resources
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contrastive.config import FORMER_LOSSES, UserError, check_length, check_path, first_line

Schema = TypeVar("Schema")

_REFUSALS = (OmegaConfBaseException, TypeError, OverflowError)
"""Errors of OmegaConf for values that do not fit the schema; the schema's own checks raise ValueError."""


_ARGUMENTS = {
    "encoder.args": "encoder.name",
    "encoder.temporal_args": "encoder.temporal",
    "objective.args": "objective.name",
}
"""Settings that are arguments of what another setting names."""


class _TextLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped
    """YAML loader that reads every plain scalar but null as text: 010, 1e5 and yes stay as they are typed."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Stated(Generic[Schema]):
    """Hold what a recipe and its overrides state, with the types of the schema; everything else is a default.

    Args:
        schema: The dataclass of all settings.
        layers: Settings in the order of precedence, the last wins; interpolations among them are resolved.
        describe: Function from a refusal to the message that names what was given.

    Attributes:
        keys: Dotted names of the settings that are stated, by whatever layer.
        given: Those of the last layer: the command line's.

    Raises:
        UserError: unknown key, wrong type.
    """

    def __init__(
        self, schema: type[Schema], layers: Sequence[DictConfig], describe: Callable[[Exception], str]
    ) -> None:
        self._schema: type = schema
        self._describe = describe
        with _refusals(describe):
            # Resolved before the schema: OmegaConf 2.3 refuses ``${augment.view_1}`` in a typed field.
            self._layer = _merge_open(schema, *layers)
            OmegaConf.resolve(self._layer)
            self._typed = self._with_defaults(self._layer)
        self.keys, self.given = (frozenset(_flat(layer)) for layer in (self._layer, layers[-1]))

    def __getitem__(self, key: str) -> Any:
        """Return a setting by its dotted name, stated or default; its range is not checked yet."""
        return OmegaConf.select(self._typed, key)

    def config(self, beneath: Mapping[str, Any] | None = None) -> Schema:
        """Check what is stated together with all defaults.

        Args:
            beneath: Values by dotted name that replace defaults; what is stated wins over them.

        Raises:
            UserError: wrong type, value out of range.
        """
        typed, lowest = self._typed, OmegaConf.create()
        for key, value in (beneath or {}).items():
            OmegaConf.update(lowest, key, value)
        with _refusals(self._describe):
            if beneath:
                typed = self._with_defaults(lowest, self._layer)
            config: Any = OmegaConf.to_object(typed)
        return config  # type: ignore[no-any-return]

    def _with_defaults(self, *layers: DictConfig) -> Any:
        return OmegaConf.merge(_defaults(self._schema), *layers)


@cache
def _defaults(schema: type) -> Any:
    """Return all settings of a schema at their defaults; it is only merged, which copies it.

    Building it anew took a third of the time of loading a config.
    """
    return OmegaConf.structured(schema)


@contextmanager
def _refusals(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn what OmegaConf and the schema refuse into a UserError."""
    try:
        yield
    except UserError:
        raise
    except _REFUSALS as error:
        raise UserError(describe(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def load_config(schema: type[Schema], folder: str, recipe: str | None, overrides: Sequence[str]) -> Schema:
    """Compose ``recipe`` with ``overrides`` and check the result; see ``read_stated``."""
    return read_stated(schema, folder, recipe, overrides).config()


def read_stated(
    schema: type[Schema], folder: str, recipe: str | None, overrides: Sequence[str]
) -> Stated[Schema]:
    """Compose ``recipe`` with ``overrides``; without a recipe, only the overrides are stated.

    A recipe is a yaml file, by path or by the name of one shipped under ``configs/<folder>``. Its
    ``defaults`` list names other recipes, or ``group/option`` files, that are merged first, in order.
    An override is ``key=value`` (``--key=value`` is the same); ``group=option`` merges
    ``configs/<folder>/<group>/<option>.yaml`` over the recipe, before all ``key=value``.

    Arguments (``encoder.args``, ``encoder.temporal_args``, ``objective.args``) belong to the network, head or
    loss that is named: where a recipe or an override names another, those of the layers below are dropped;
    ``{}`` clears them.

    Settings that are text in the schema keep their characters (``run.name=3e10482``), in files too.

    Raises:
        UserError: unknown recipe or key, wrong type, a word without ``=``.
    """
    pairs = [_split_override(text) for text in overrides]
    options = [(key, value) for key, value in pairs if _is_group(schema, key)]
    layers = [_compose(schema, folder, recipe)] if recipe is not None else []
    layers += [_read(schema, _find(f"{key}/{value}", folder), group=key) for key, value in options]
    values = [(key, value) for key, value in pairs if not _is_group(schema, key)]

    def describe(error: Exception) -> str:
        where = "" if getattr(error, "full_key", None) else f"{_culprit(schema, values) or recipe}: "
        return where + _explain(error, schema)

    with _refusals(describe):
        layers.append(_from_overrides(schema, values))
    return Stated(schema, layers, describe)


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
    layer = _read(schema, path)
    _update_saved(layer)
    try:
        return Stated(schema, [layer], lambda error: _explain(error, schema)).config()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _update_saved(saved: DictConfig) -> None:
    """Leave a run's config.yaml with settings of this release; ``objective.name`` named the method before."""
    loss = str(_flat(saved).get("objective.name"))
    if saved.get("method") in (None, "auto"):
        saved.method = (FORMER_LOSSES | {"neighbour_info_nce": "neighbour"}).get(loss, "moco")
    if loss in FORMER_LOSSES:
        saved.objective.name = "info_nce"
    saved.pop("provenance", None)


def to_yaml(config: Any) -> str:
    """Write the config as yaml, including every default."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to their dotted names; lists and empty groups are values."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        values |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Find the fields in which two configs differ: dotted names, with both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    for item in fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if is_dataclass(before):
            changed |= differences(before, after, f"{prefix}{item.name}.")
        elif before != after:
            changed[prefix + item.name] = (before, after)
    return changed


def _culprit(schema: type, values: list[tuple[str, str]]) -> str | None:
    """Find the override that the schema refuses, for errors that do not name the setting."""
    for key, value in values:
        try:
            OmegaConf.merge(OmegaConf.structured(schema), _from_overrides(schema, [(key, value)]))
        except _REFUSALS:
            return f"{key}={value}"
    return None


def _from_overrides(schema: type, values: list[tuple[str, str]]) -> DictConfig:
    merged = OmegaConf.create()
    for key, value in values:
        if value.strip("'\"") == "???":  # which a merge would ignore
            raise UserError(
                f"{key}=???: stands for a value that is still to be set; give one, or leave it out"
            )
        try:
            OmegaConf.update(merged, key, _parse(_type_of(schema, key), value))
        except Exception as error:  # yaml raises a dozen types; each means the same to the user
            reason = first_line(error)
            raise UserError(
                f"{f'{key}={value}'!r}: not readable as key=value ({reason}); quote text: key='\"...\"'"
            ) from error
    return merged


def _parse(kind: Any, value: str) -> Any:
    """Parse the value of an override. Text is taken as typed, unless it is quoted, null or empty.

    Of arguments, null is none.
    """
    if get_origin(kind) is dict and value == "null":
        return {}
    if kind is str and value not in ("", "null") and not value.startswith(("'", '"')):
        return value
    typed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    return _keep_text(kind, typed["value"], yaml.load(value, _TextLoader))


def _keep_text(kind: Any, typed: Any, text: Any) -> Any:
    """Return ``typed``, with values of ``text`` (the same by ``_TextLoader``) where the schema has text."""
    if kind is str:
        return text
    if get_origin(kind) is list and isinstance(typed, list):
        (item,) = get_args(kind)
        return [_keep_text(_bare(item), *both) for both in zip(typed, text, strict=True)]
    if is_dataclass(kind) and isinstance(typed, dict):
        both = zip(typed.items(), text.values(), strict=True)
        return {key: _keep_text(_type_of(kind, str(key)), value, raw) for (key, value), raw in both}
    return typed


def _type_of(schema: Any, key: str) -> Any:
    """Return the type of a setting by its dotted name; Any if the schema does not define it."""
    for name in key.split("."):
        types = {item.name: item.type for item in fields(schema)} if is_dataclass(schema) else {}
        schema = _bare(types.get(name, Any))
    return schema


def _bare(kind: Any) -> Any:
    """Return the type without None: ``str`` for ``str | None``."""
    some = [part for part in get_args(kind) if part is not NoneType]
    return some[0] if len(some) == 1 and NoneType in get_args(kind) else kind


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise UserError(f"{text!r}: an override is key=value, e.g. schedule.epochs=10; --help lists the rest")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text!r}: not UTF-8, as settings must be; if it is a path, use a link with a UTF-8 name"
        ) from error
    return key, value


def _is_group(schema: type, key: str) -> bool:
    """Return whether ``key`` names a whole group, so that its value is one of the group's files."""
    groups = (
        item.name for item in fields(schema) if is_dataclass(item.type) or get_origin(item.type) is dict
    )
    return key in groups


def _compose(schema: type, folder: str, recipe: str, within: tuple[Path, ...] = ()) -> DictConfig:
    path = _find(recipe, folder)
    if path in within:
        raise UserError(f"{path}: includes itself through defaults; take it out of the list")
    body = _read(schema, path)
    merged = OmegaConf.create()
    if "provenance" in body:  # a run's config.yaml is a recipe too
        _update_saved(body)
    defaults = body.pop("defaults", None)
    if not isinstance(defaults, ListConfig | None):
        raise UserError(
            f"{path}: defaults={defaults!r}: a list is needed, e.g. defaults: [cifar10, mining/band]"
        )
    for name in defaults or ():
        group, _, option = str(name).rpartition("/")
        beside = path.parent / f"{name}.yaml"
        file = beside if beside.is_file() else _find(str(name), folder)
        layer = (
            _read(schema, file, group=group)
            if option and group and not option.endswith((".yaml", ".yml"))
            else _compose(schema, folder, str(file), (*within, path))
        )
        merged = _merge_open(schema, merged, layer)
    return _merge_open(schema, merged, body)


def _merge_open(schema: type, *layers: DictConfig) -> DictConfig:
    """Merge layers, the last wins; arguments below another name or {} are dropped, see ``read_stated``."""
    merged = OmegaConf.create()
    for layer in layers:
        before, stated = (_flat(each) for each in (merged, layer))
        for arguments, owner in _ARGUMENTS.items():
            name = before.get(owner, OmegaConf.select(_defaults(schema), owner))
            if stated.get(owner, name) != name or stated.get(arguments) == {}:
                group, _, key = arguments.rpartition(".")
                if isinstance(settings := merged.get(group), DictConfig):
                    settings.pop(key, None)
        merged = cast(DictConfig, OmegaConf.merge(merged, layer))
    return merged


def _flat(layer: DictConfig) -> dict[str, Any]:
    return flat(cast(dict[str, Any], OmegaConf.to_container(layer)))


def _read(schema: type, path: Path, group: str = "") -> DictConfig:
    """Read a yaml file, as it is or as the content of ``group``."""
    kind = _type_of(schema, group) if group else schema
    try:
        body, text = _parse_file(path.read_text(encoding="utf-8"))
    except Exception as error:  # yaml raises a dozen types; each means the same to the user
        raise UserError(f"{path}: not a readable yaml file ({error})") from error
    if not isinstance(body, DictConfig):
        raise UserError(f"{path}: a yaml mapping is needed, e.g. 'data:' with 'name: digits' below it")
    content = _keep_text(kind, OmegaConf.to_container(body), text or {})
    return OmegaConf.create({group: content} if group else content)


@lru_cache(maxsize=64)
def _parse_file(text: str) -> tuple[Any, Any]:
    """Parse the text of a yaml file with its types and as text; both results are only read.

    A process reads the same recipes and saved configs several times.
    """
    return OmegaConf.load(StringIO(text)), yaml.load(text, _TextLoader)


def _find(name: str, folder: str) -> Path:
    """Find a yaml file by path, or a shipped one by name."""
    check_length("config", name)
    if name.endswith((".yaml", ".yml")):
        if (own := Path(check_path("config", name))).is_file():
            return own
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
    """List the shipped recipes of ``configs/<folder>``."""
    return sorted(file.stem for file in (Path(str(resources.files("configs"))) / folder).glob("*.yaml"))


def _keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(item.type):
            keys += _keys(item.type, f"{prefix}{item.name}.")
    return keys


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
    """Return the end of an error message: the closest allowed name, and its siblings."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    siblings = [name for name in allowed if name.rpartition(".")[0] == group]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed are {', '.join(siblings)}"

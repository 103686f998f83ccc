"""Look up a part by its name in a config, in one of the tables of contrastive/registry.py, and build it."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from contrastive.config import UserError
from contrastive.config_files import nearest


def find_part(setting: str, table: dict[str, str], name: str) -> Any:
    """Import the object that ``table`` gives for ``name``.

    Args:
        setting: Setting that holds the name, for the message.
        table: Names to ``module:attribute``.
        name: A key of ``table``.

    Raises:
        UserError: unknown name; the message suggests the nearest one.
    """
    if name not in table:
        raise UserError(f"{setting}={name!r}: unknown; {nearest(name.lower(), [*table])}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def build_part(
    chosen: str,
    setting: str,
    build: Callable[..., Any],
    *given: Any,
    args: Mapping[str, Any],
    offered: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Call the function of a part with the arguments that a config gives for it.

    Args:
        chosen: Setting that names the part, with its value, for messages: ``encoder.name=vit_tiny``.
        setting: Setting that holds ``args``: ``encoder.args``.
        build: The function.
        given: Its first arguments.
        args: Further arguments, by name.
        offered: Values that are not among ``args``; passed where the function has an argument of that name.

    Raises:
        UserError: arguments that the function does not have, with the nearest name, or does not accept.
    """
    names = argument_names(build)[len(given) :]
    allowed = [name for name in names if name not in offered]
    unknown = [name for name in args if name not in allowed]
    if unknown and "**" not in allowed:
        hint = nearest(unknown[0], allowed) if allowed else "it has none"
        raise UserError(f"{setting}.{unknown[0]}: {chosen} has no such argument; {hint}")
    wanted = {name: value for name, value in offered.items() if name in names}
    try:
        return build(*given, **args, **wanted)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{chosen} {setting}={args}: {error}") from error


def argument_names(build: Callable[..., Any]) -> list[str]:
    """List the arguments of a function; ``**`` if it takes any others and checks them itself."""
    parameters = inspect.signature(build).parameters.values()
    return ["**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters]

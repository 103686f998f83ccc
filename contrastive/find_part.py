"""Look up a part by its name in a config, in one of the tables of contrastive/registry.py."""

import difflib
from importlib import import_module
from typing import Any

from contrastive.config import UserError


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
        close = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{setting}={name!r}: unknown; {hint}allowed are {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)

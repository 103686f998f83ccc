"""Mining methods by name, without importing torch: the config checks ``mining.method`` against these names.

To add a method of your own, put its class here before the config is built::

    METHODS["mine"] = Mine  # a memory_bank.methods.base.MiningMethod
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


def _shipped(file: str, name: str) -> Any:
    return getattr(import_module(f"memory_bank.methods.{file}"), name)()


METHODS: dict[str, Callable[[], Any]] = {
    "ranked": partial(_shipped, "ranked", "Ranked"),
    "all_rows": partial(_shipped, "all_rows", "AllRows"),
    "full_bank": partial(_shipped, "full_bank", "FullBank"),
    "in_batch": partial(_shipped, "in_batch", "InBatch"),
}
"""Name -> class of the method, or any other callable without arguments that returns one."""

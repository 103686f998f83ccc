"""Mining methods and search backends by name, without importing torch: the config checks names against these.

To add one of your own, put it here before the config is built::

    METHODS["mine"] = Mine  # a memory_bank.methods.base.MiningMethod
    BACKENDS["mine"] = build_mine  # memory_bank.retrieval.base.SearchSpec -> Retrieval
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


def _shipped(file: str, name: str, *given: Any) -> Any:
    return getattr(import_module(f"memory_bank.{file}"), name)(*given)


METHODS: dict[str, Callable[[], Any]] = {
    "ranked": partial(_shipped, "methods.ranked", "Ranked"),
    "all_rows": partial(_shipped, "methods.all_rows", "AllRows"),
    "full_bank": partial(_shipped, "methods.full_bank", "FullBank"),
    "in_batch": partial(_shipped, "methods.in_batch", "InBatch"),
}
"""Name -> class of the method, or any other callable without arguments that returns one."""

BACKENDS: dict[str, Callable[[Any], Any]] = {
    "exact": partial(_shipped, "retrieval.exact", "build_exact"),
    "faiss": partial(_shipped, "retrieval.faiss_search", "build_faiss"),
    "subsample": partial(_shipped, "retrieval.exact", "build_subsample"),
}
"""Name -> function that builds a search of a bank; ``auto`` chooses one (memory_bank/backend.py)."""

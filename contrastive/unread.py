"""Find settings that no part of a run reads, so that they have no effect."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from contrastive.config import PretrainConfig
from contrastive.data.order.base import Order
from contrastive.find_part import argument_names, find_part
from contrastive.registry import METHODS, OBJECTIVES
from memory_bank.config import SEARCH, SELECTION
from memory_bank.methods.base import MiningMethod
from memory_bank.registry import METHODS as MINING_METHODS

_SHARED = ("name", "args", "temperature", "symmetric", "own_negatives")
"""Settings of ``objective`` that are not of single losses or methods."""


def unread(
    config: PretrainConfig, method: Callable[..., Any], name: str, mining: MiningMethod, order: Order | None
) -> list[str]:
    """Return a line for each group with settings that are not at their defaults and that nothing reads.

    Args:
        config: The run.
        method: The class of its method. A function that builds one declares nothing: it is taken to mine, and
            may read any setting of ``objective``.
        name: Of the method, for messages.
        mining: Its mining method.
        order: Its order of the data; None is ``data.order=global``.
    """
    mines = getattr(method, "mines", True)
    read = {*_read_by_loss(config), *getattr(method, "reads", ()), *(f"mining.{each}" for each in SEARCH)}
    if order is not None:
        read.update(order.reads)
    if mines:
        read.update(f"mining.{each}" for each in ("method", *mining.reads))
        chosen = f"mining.method={config.mining.method}"
    else:
        chosen = f"method={name}, which takes no negatives from the bank"
    lines = _lines("mining", config.mining, read, _readers_of_mining(mines), chosen)
    if hasattr(method, "reads"):
        chosen = f"objective.name={config.objective.name} and method={name}"
        lines += _lines("objective", config.objective, read, _readers_of_objective(), chosen)
    return lines


def _read_by_loss(config: PretrainConfig) -> set[str]:
    own = _settings_of(config.objective.name)
    read = {f"objective.{each}" for each in (*_SHARED, *own)}
    takes_prior = "tau_plus" in own and config.objective.tau_plus is None
    return read | {"mining.class_prior"} if takes_prior else read


def _lines(
    group: str, settings: Any, read: Collection[str], readers: Mapping[str, Collection[str]], chosen: str
) -> list[str]:
    """Name the unread settings of one group, those with the same readers in one line."""
    by_readers: dict[tuple[str, ...], list[str]] = {}
    defaults = type(settings)()
    for item in fields(settings):
        key, value = f"{group}.{item.name}", getattr(settings, item.name)
        if key not in read and value != getattr(defaults, item.name):
            others = tuple(choice for choice, keys in readers.items() if key in keys)
            by_readers.setdefault(others, []).append(f"{key}={value}")
    return [_line(names, chosen, others) for others, names in by_readers.items()]


def _line(names: Sequence[str], chosen: str, readers: Sequence[str]) -> str:
    has, them = ("has", "it") if len(names) == 1 else ("have", "them")
    line = f"{_listed(names)} {has} no effect with {chosen}"
    if not readers:
        return line
    return f"{line}; {_listed(readers)} {'reads' if len(readers) == 1 else 'read'} {them}"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _readers_of_mining(mines: bool) -> dict[str, set[str]]:
    if mines:
        return {
            f"mining.method={name}": {f"mining.{each}" for each in build().reads}
            for name, build in MINING_METHODS.items()
        }
    mining = {f"mining.{each}" for each in SELECTION}
    methods = {name: find_part("method", METHODS, name) for name in METHODS}
    return {f"method={name}": mining for name, each in methods.items() if getattr(each, "mines", True)}


def _readers_of_objective() -> dict[str, set[str]]:
    losses = {
        f"objective.name={name}": {f"objective.{each}" for each in _settings_of(name)} for name in OBJECTIVES
    }
    methods = {
        f"method={name}": {*getattr(find_part("method", METHODS, name), "reads", ())} for name in METHODS
    }
    return losses | methods


def _settings_of(loss: str) -> list[str]:
    """List the settings that a loss declares: all arguments of its function but the first."""
    return argument_names(find_part("objective.name", OBJECTIVES, loss))[1:]

"""Look up the method that a config names."""

from contrastive.config import PretrainConfig
from contrastive.find_part import find_part
from contrastive.methods.method import BuildMethod
from contrastive.registry import METHODS
from memory_bank.methods.base import MiningMethod


def find_method(config: PretrainConfig) -> BuildMethod:
    """Return the class of the config's method."""
    method: BuildMethod = find_part("method", METHODS, config.method)
    return method


def takes_from_bank(method: BuildMethod, mining: MiningMethod) -> bool:
    """Return whether the negatives come from the bank; a function that builds a method is taken to mine."""
    return bool(getattr(method, "mines", True)) and mining.uses_bank

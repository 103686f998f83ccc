"""From a config to the method it names."""

from importlib import import_module

from contrastive.config import PretrainConfig
from contrastive.methods.method import BuildMethod
from contrastive.registry import METHODS


def find_method(config: PretrainConfig) -> BuildMethod:
    """Return the class of the config's method."""
    module, _, name = METHODS[config.method_name].partition(":")
    found: BuildMethod = getattr(import_module(module), name)
    return found

"""Look up the method that a config names."""

from contrastive.config import PretrainConfig
from contrastive.find_part import find_part
from contrastive.methods.method import BuildMethod
from contrastive.registry import METHODS


def find_method(config: PretrainConfig) -> BuildMethod:
    """Return the class of the config's method."""
    method: BuildMethod = find_part("method", METHODS, config.method_name)
    return method

"""The names that a config may use, and where each is defined: one line here for each new part."""

METHODS = {
    "moco": "contrastive.methods.moco:Moco",
    "simclr": "contrastive.methods.simclr:SimClr",
}
"""``method``: subclasses of ``contrastive.methods.method.Method``."""

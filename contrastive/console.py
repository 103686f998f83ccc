"""How the command lines speak: results on stdout, everything else on stderr."""

import logging


def log_to_stderr() -> None:
    """Send our packages' log to stderr at INFO; other libraries keep their own settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("contrastive", "memory_bank", "eval"):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO)
        package.handlers = [handler]
        package.propagate = False

"""Console output of the command lines: results on stdout, everything else on stderr."""

import logging
import os
import sys

from contrastive.config import UserError


def print_result(text: str) -> None:
    """Print a result to stdout; a closed pipe (``| head -1``) is no error.

    Raises:
        UserError: stdout cannot be written, e.g. a file on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Else flushing the rest of the buffer would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(
                f"stdout cannot be written ({error.strerror}); free some space, or send it elsewhere"
            ) from error


def log_to_stderr() -> None:
    """Send our packages' log to stderr at INFO; other libraries keep their own settings."""
    if sys.stderr is None:  # the caller closed stderr; progress bars and loggers expect one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("contrastive", "memory_bank", "eval"):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO)
        package.handlers = [handler]
        package.propagate = False

"""Decide whether networks and views are compiled."""

import importlib.util
import logging
import shutil

import torch

logger = logging.getLogger(__name__)

COMPILER = "inductor"
"""Backend of ``torch.compile``."""


def compiler(setting: str, device: torch.device) -> str | None:
    """Return the backend of ``torch.compile`` for ``run.compile`` on ``device``; None to not compile.

    On a CPU ``auto`` does not compile: the networks' convolutions would not get faster.
    """
    if setting == "auto" and device.type == "cuda":
        missing = [] if importlib.util.find_spec("triton") else ["Triton"]
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            missing.append("a C compiler")
        if missing:
            logger.info("networks and views are not compiled: %s missing", " and ".join(missing))
        return None if missing else COMPILER
    return COMPILER if setting == "true" else None

"""Keep the memory that a step frees, since the next step needs as much."""

import ctypes
import os
import sys

# Options of mallopt, their numbers in malloc.h and values: bytes from which freeing a block returns it to the
# system (32 MiB is the most that is accepted); free bytes at the end of the heap above which they are
# returned; bytes by which the heap grows.
_OPTIONS = {
    "M_MMAP_THRESHOLD": (-3, 32 << 20),
    "M_TRIM_THRESHOLD": (-1, 1 << 30),
    "M_TOP_PAD": (-2, 64 << 20),
}


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory in this process.

    By default it returns tensors of some megabytes to the system as soon as they are freed, and the system
    clears all pages of the next step's: with 20,000 rows as negatives of 128 queries, a fifth of a training
    step on a CPU. Does nothing with another C library, or if the environment says how to allocate
    (``MALLOC_...``, ``glibc.malloc`` in ``GLIBC_TUNABLES``).
    """
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if told or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _OPTIONS.values():
            mallopt(option, value)

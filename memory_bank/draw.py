"""Random draws as a pure function of (seed, step, id): the same whatever the rank, the batch or the resume.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) used as a
counter-based hash. int64 arithmetic wraps alike on the CPU and on CUDA, so both draw the same rows.
"""

import torch
from torch import Tensor

from memory_bank.shapes import Bool, Int
from memory_bank.top import largest

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """One 64-bit key from several integers; the order matters."""
    key = 0
    for part in parts:
        key = (key + part + _GOLDEN) & _MASK
        key = ((key ^ (key >> 30)) * _FIRST) & _MASK
        key = ((key ^ (key >> 27)) * _SECOND) & _MASK
        key ^= key >> 31
    return key


def noise(counter: Int[Tensor, "..."], key: int) -> Int[Tensor, "..."]:
    """Uniform int64 in [0, 2^62), one a counter; equal counters give equal values."""
    mixed = counter * _signed(_GOLDEN) + _signed(key)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_SECOND)
    return (mixed ^ _shifted(mixed, 31)) & ((1 << 62) - 1)


def draw_slots(admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
    """``min(count, n)`` different admissible slots, uniformly; -1 fills up where there are fewer.

    One pass over n without a host sync, so that it can run ahead of a GPU.
    """
    n = admissible.shape[0]
    slots = torch.arange(n, device=admissible.device)
    value, drawn = largest(noise(slots, key).masked_fill_(~admissible, -1), min(count, n))
    return drawn.masked_fill_(value < 0, -1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)

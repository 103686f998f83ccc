"""Random draws as a pure function of (seed, step, id): the same whatever the rank, the batch or the resume.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) used as a
counter-based hash. int64 arithmetic wraps alike on the CPU and on CUDA, so both draw the same rows.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_ROUNDS = 4
# Places looked at beyond those that are needed on average, so that a second look is rare.
_SPARE = 256


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

    The first of ``shuffled`` that are admissible. A CPU looks no further than it needs to; elsewhere, where
    knowing how far that is would be a wait, all are looked at.
    """
    n = admissible.shape[0]
    count, whole = min(count, n), domain(n)
    looked_at = whole
    if admissible.device.type == "cpu":
        looked_at = min(whole, count + count * (whole - n) // n + _SPARE)
    while True:
        slots = shuffled(torch.arange(looked_at, device=admissible.device), n, key)
        fits = (slots < n) & admissible[slots.clamp_max(n - 1)]
        if looked_at == whole or int(fits.sum()) >= count:
            break
        looked_at = min(whole, 4 * looked_at)
    place = first(fits, count)
    return shuffled(place, n, key).masked_fill_(place == looked_at, -1)


def first(flags: Bool[Tensor, " m"], count: int) -> Int[Tensor, " k"]:
    """Places of the first ``count`` flags that are set, ascending; m where there are fewer. Never waits."""
    place = torch.arange(len(flags), device=flags.device)
    rank = torch.where(flags, flags.cumsum(0) - 1, count).clamp_max_(count)
    return place.new_full((count + 1,), len(flags)).scatter_(0, rank, place)[:count]


def domain(n: int) -> int:
    """How many places ``shuffled`` has for n slots: a power of two, and enough to mix well."""
    return 1 << max(8, (n - 1).bit_length())


def shuffled(place: Int[Tensor, " m"], n: int, key: int) -> Int[Tensor, " m"]:
    """What stands at each place, in [0, domain(n)), of a random order of [0, domain(n)).

    Rounds of two steps that can be undone modulo a power of two: times an odd number plus a number, which
    carries low bits upwards, and the upper half of the bits onto the lower.
    """
    last = domain(n) - 1
    half = (last.bit_length() + 1) // 2
    for turn in range(_ROUNDS):
        factor, summand = mix(key, turn, 0) & last | 1, mix(key, turn, 1) & last
        place = (place * factor + summand) & last
        place = place ^ (place >> half)
    return place


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)

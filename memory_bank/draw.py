"""Draw random rows as a pure function of (seed, step, id): equal on every rank, in any batch, after a resume.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) used as a
counter-based hash. int64 arithmetic wraps the same way on the CPU and on CUDA, so both draw the same rows.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_ROUNDS = 4
# Extra positions to examine beyond the number needed on average, so that a second pass is rare.
_SPARE = 256


def mix(*parts: int) -> int:
    """Hash several integers into one 64-bit key; their order matters."""
    key = 0
    for part in parts:
        key = (key + part + _GOLDEN) & _MASK
        key = ((key ^ (key >> 30)) * _FIRST) & _MASK
        key = ((key ^ (key >> 27)) * _SECOND) & _MASK
        key ^= key >> 31
    return key


def noise(counter: Int[Tensor, "..."], key: int) -> Int[Tensor, "..."]:
    """Return a uniform int64 in [0, 2^62) for each counter; equal counters give equal values."""
    mixed = counter * _signed(_GOLDEN) + _signed(key)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_SECOND)
    return (mixed ^ _shifted(mixed, 31)) & ((1 << 62) - 1)


def draw_slots(admissible: Bool[Tensor, " n"], count: int, key: int) -> Int[Tensor, " m"]:
    """Draw ``min(count, n)`` different admissible slots uniformly; -1 where there are fewer.

    Takes the first admissible slots of a shuffled order. On a CPU it stops when it has enough; on a GPU,
    where checking that would synchronise with the host, it examines all slots.
    """
    n = admissible.shape[0]
    count, whole = min(count, n), domain(n)
    examined = examined_first(n, count) if admissible.device.type == "cpu" else whole
    while True:
        slots = shuffled(torch.arange(examined, device=admissible.device), n, key)
        fits = (slots < n) & admissible[slots.clamp_max(n - 1)]
        if examined == whole or int(fits.sum()) >= count:
            break
        examined = min(whole, 4 * examined)
    positions = first(fits, count)
    return shuffled(positions, n, key).masked_fill_(positions == examined, -1)


def examined_first(n: int, count: int) -> int:
    """Return how many positions of ``shuffled`` likely hold ``count`` of n slots."""
    whole = domain(n)
    return min(whole, count + count * (whole - n) // n + _SPARE)


def first(flags: Bool[Tensor, " m"], count: int) -> Int[Tensor, " k"]:
    """Return positions of the first ``count`` set flags, m where there are fewer; no device sync."""
    position = torch.arange(len(flags), device=flags.device)
    rank = torch.where(flags, flags.cumsum(0) - 1, count).clamp_max_(count)
    return position.new_full((count + 1,), len(flags)).scatter_(0, rank, position)[:count]


def domain(n: int) -> int:
    """Return the number of positions of ``shuffled`` for n slots: a power of two, enough to mix well."""
    return 1 << max(8, (n - 1).bit_length())


def shuffled(position: Int[Tensor, " m"], n: int, key: int) -> Int[Tensor, " m"]:
    """Return the element at each position of a random permutation of [0, domain(n)).

    Each round applies two steps that are invertible modulo a power of two: an affine map with an odd factor,
    which carries low bits upwards, and an xor of the upper half of the bits onto the lower.
    """
    last = domain(n) - 1
    half = (last.bit_length() + 1) // 2
    for turn in range(_ROUNDS):
        factor, summand = mix(key, turn, 0) & last | 1, mix(key, turn, 1) & last
        position = (position * factor + summand) & last
        position = position ^ (position >> half)
    return position


def permuted(position: Int[Tensor, " m"], n: int, key: int) -> Int[Tensor, " m"]:
    """Return the element at each position of a random permutation of [0, n), in constant memory.

    Walks along ``shuffled``'s permutation of the larger domain until it is back below n (cycle walking, Black
    and Rogaway 2002, doi:10.1007/3-540-45760-7_9): below 2 rounds on average where n is above 128.

    Args:
        position: int64, in [0, n).
        n: Elements, 1 or more.
        key: Chooses the permutation.
    """
    element = shuffled(position, n, key)
    while (outside := element >= n).any():
        element[outside] = shuffled(element[outside], n, key)
    return element


def _signed(value: int) -> int:
    """Return the int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right logically; torch's shift is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)

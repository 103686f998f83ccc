"""Compute random numbers as a pure function of (seed, epoch, id, view): no generator, no state, no order.

The same image therefore gets the same views at any batch size, rank, world size or resume. The generator is
Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3): the key is
(seed, epoch), the counter (id low, id high, view, block).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
# Multipliers and key increments of Philox-4x32, from the reference code of the paper.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

MANTISSA = 2**24  # uniforms are multiples of 1 / MANTISSA, which float32 represents exactly below 1


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox-4x32-10: four random 32-bit words for each counter.

    Args:
        counter: Four int64 tensors that broadcast together, each in [0, 2**32).
        key: Two integers in [0, 2**32), or int64 scalars of the counter's device.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product overflows int64, but its 64 bits are right; the masks drop the sign.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _WORD, product1 & _WORD
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _WORD, product0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def uniforms(
    seed: int, epoch: int | Tensor, ids: Int[Tensor, " b"], view: int | Int[Tensor, " b"], count: int
) -> Float[Tensor, "b count"]:
    """Draw ``count`` uniform numbers for each image.

    Number i does not depend on ``count``: a larger count does not change the first numbers.

    Args:
        seed: In [0, 2**32).
        epoch: In [0, 2**32); a scalar tensor on the device of ``ids`` is not a constant of a compiled graph.
        ids: Data set rows, int64; any value.
        view: In [0, 2**32), for all images or one each.
        count: Numbers for each image.

    Returns:
        float32 in [0, 1), multiples of 2**-24, on the device of ``ids``.
    """
    blocks = torch.arange(-(-count // 4), device=ids.device)
    low, high = (ids & _WORD)[:, None], ((ids >> 32) & _WORD)[:, None]
    views = view[:, None] if isinstance(view, Tensor) else torch.full_like(blocks, view)
    words = philox((low, high, views & _WORD, blocks), (seed & _WORD, epoch & _WORD))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :count]
    return (bits >> 8).to(torch.float32) / MANTISSA


def normals(stream: Int[Tensor, "b 2"], count: int) -> Float[Tensor, "b count"]:
    """Draw ``count`` standard normal numbers for each pair of seeds, cheaply enough for one per pixel.

    A hash of the position (the mixing steps of "lowbias32" by C. Wellons, found by search for low bias)
    instead of Philox, which has ten rounds; then Box-Muller on its two halves, so that no value exceeds 4.9.

    Args:
        stream: Two seeds per row, in [0, 2**24).
        count: Numbers per row.

    Returns:
        float32.
    """
    pairs = -(-count // 2)
    seeds = stream.to(torch.int32) << 8
    index = torch.arange(pairs, dtype=torch.int32, device=stream.device)
    # 32-bit integers overflow, as the hash requires.
    state = index * _signed(_W0) + seeds[:, :1]
    state = _shift_xor(state, 16).mul_(_signed(0x7FEB352D))
    state = _shift_xor(state, 15).bitwise_xor_(seeds[:, 1:]).mul_(_signed(0x846CA68B))
    state = _shift_xor(state, 16)
    angle = (state & 0xFFFF).to(torch.float32).mul_(2 * math.pi / 2**16)
    # Adding 0.5 keeps the logarithm's argument above 0.
    radius = (
        (state >> 16).bitwise_and_(0xFFFF).to(torch.float32).add_(0.5).div_(2**16).log_().mul_(-2).sqrt_()
    )
    noise = torch.stack((angle.cos(), angle.sin_()), dim=1).mul_(radius[:, None])
    return noise.flatten(1)[:, :count]


def _shift_xor(state: Tensor, bits: int) -> Tensor:
    """Return ``state ^ (state >> bits)`` with a logical shift."""
    return (state >> bits).bitwise_and_((1 << (32 - bits)) - 1).bitwise_xor_(state)


def _signed(word: int) -> int:
    """Return the int32 with the same bits as a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word

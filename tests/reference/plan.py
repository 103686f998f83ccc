"""Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain integers."""

_MASK = 2**64 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    for _ in range(10):
        high_0, low_0 = divmod(_MULTIPLIERS[0] * counter[0], 2**64)
        high_1, low_1 = divmod(_MULTIPLIERS[1] * counter[2], 2**64)
        counter = (high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0)
        key = ((key[0] + _WEYL[0]) & _MASK, (key[1] + _WEYL[1]) & _MASK)
    return counter


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """Return rows sorted by one word each; blocks are numbered from 1, key is (seed, epoch)."""
    words: list[int] = []
    block = 1
    while len(words) < rows:
        words += philox_block((block, 0, 0, 0), (seed, epoch))
        block += 1
    return sorted(range(rows), key=lambda row: words[row])


def blocks(rows: int, seed: int, epoch: int, block: int, interleave: int, shift: int) -> list[int]:
    """Return whole blocks in the order above, a row of each of ``interleave`` in turn, then the rest."""
    permuted = order(rows // block, seed, epoch)
    found: list[int] = []
    for start in range(0, len(permuted), interleave):
        for row in range(block):
            found += [number * block + row for number in permuted[start : start + interleave]]
    found += range(rows // block * block, rows)
    return [(row + shift) % rows for row in found]

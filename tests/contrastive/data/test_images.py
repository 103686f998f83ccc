import hashlib

import numpy as np

from contrastive.data.arrays import ArrayImages
from contrastive.data.images import fingerprint, spread_rows


def pixels(n, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_fingerprint_tells_keys_sizes_and_order_apart():
    rows = [("a", "1"), ("b", "2")]
    others = [
        [("b", "2"), ("a", "1")],
        [("a", "1")],
        [("a", "12"), ("b", "")],
        [("a1", ""), ("b", "2")],
        [("a", "1"), ("b", "3")],
    ]
    prints = {fingerprint(each) for each in [rows, *others]}
    assert len(prints) == 6
    assert fingerprint(rows) == hashlib.sha256(b"a\x001\x00b\x002\x00").hexdigest()


def test_a_changed_pixel_changes_the_fingerprint():
    source = pixels(3)
    before = ArrayImages("set", [source], 4).fingerprint()
    source[1, 2, 3, 0] ^= 1
    assert ArrayImages("set", [source], 4).fingerprint() != before


def test_rows_are_spread_from_the_first_to_the_last_beyond_what_float32_counts():
    assert spread_rows(16_777_220, 3).tolist() == [0, 8_388_609, 16_777_219]
    assert spread_rows(3, 8).tolist() == [0, 1, 2]
    assert spread_rows(0, 8).tolist() == []

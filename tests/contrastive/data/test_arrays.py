import hashlib

import numpy as np
import torch

from contrastive.data.arrays import ArrayImages


def pixels(n, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_array_rows_follow_each_other_over_several_arrays():
    first, second = pixels(3), pixels(2, seed=1)
    images = ArrayImages("set", [first, second], 4)
    assert len(images) == 5
    for row, wanted in enumerate([*first, *second]):
        assert np.array_equal(images.read(row).numpy(), wanted.transpose(2, 0, 1))
        assert images.key(row) == f"set/{row}"
        assert images.stamp(row) == hashlib.sha256(wanted.tobytes()).hexdigest()[:16]


def test_a_subset_keeps_the_numbers_of_its_source():
    source = pixels(6)
    images = ArrayImages("set", [source], 4, rows=np.array([5, 2]), labels=torch.tensor([1, 0]))
    assert [images.key(row) for row in range(2)] == ["set/5", "set/2"]
    assert np.array_equal(images.read(0).numpy(), source[5].transpose(2, 0, 1))
    assert images.labels.tolist() == [1, 0]


def test_arrays_of_another_size_are_resized():
    images = ArrayImages("set", [np.full((1, 4, 4, 3), 77, dtype=np.uint8)], 10)
    assert torch.equal(images.read(0), torch.full((3, 10, 10), 77, dtype=torch.uint8))


def test_what_is_read_may_be_written_to():
    source = pixels(1)
    kept = source.copy()
    ArrayImages("set", [source], 4).read(0).zero_()
    assert np.array_equal(source, kept)

import math

import numpy as np
import pytest
import torch

from contrastive.augment.noise import normals, philox, uniforms
from tests.reference import augment as reference


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known-answer vectors of the authors' Random123 library
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    numbers = [torch.tensor([int(word, 16)]) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word.item():08x}" for word in philox(tuple(numbers), (k0, k1))] == words.split()


def test_uniforms_equal_the_reference():
    ids = [0, 1, 17, 2**32 - 1, 2**32, 2**40 + 3, -1]
    ours = uniforms(2**32 - 1, 12, torch.tensor(ids), 1, 7)
    assert ours.dtype == torch.float32
    assert ours.tolist() == [reference.uniforms(2**32 - 1, 12, row, 1, 7) for row in ids]


def test_each_argument_changes_the_numbers():
    ids = torch.tensor([5])
    drawn = [uniforms(0, 0, ids, 0, 4), uniforms(1, 0, ids, 0, 4), uniforms(0, 1, ids, 0, 4)]
    drawn += [uniforms(0, 0, ids, 1, 4), uniforms(0, 0, ids + 1, 0, 4), uniforms(0, 0, ids + 2**32, 0, 4)]
    assert len({tuple(numbers[0].tolist()) for numbers in drawn}) == len(drawn)


def test_each_image_may_have_a_view_of_its_own():
    ids, view = torch.tensor([5, 6, 5]), torch.tensor([0, 1, 1])
    alone = [uniforms(3, 2, ids[i : i + 1], int(view[i]), 6) for i in range(3)]
    assert torch.equal(uniforms(3, 2, ids, view, 6), torch.cat(alone))


def test_asking_for_more_keeps_the_first():
    ids = torch.arange(3)
    assert torch.equal(uniforms(0, 0, ids, 0, 50)[:, :6], uniforms(0, 0, ids, 0, 6))


def test_uniforms_are_uniform_and_independent():
    numbers = uniforms(3, 1, torch.arange(10_000), 0, 8)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    # Standard error of a mean of 10,000 is 0.0029, of a correlation 0.01; five of each.
    assert (numbers.mean(0) - 0.5).abs().max() < 0.0145
    correlation = torch.corrcoef(numbers.T) - torch.eye(8)
    assert correlation.abs().max() < 0.05
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = numbers.numel() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)


def test_normals_have_normal_moments_and_no_structure():
    stream = (uniforms(0, 0, torch.arange(64), 0, 2) * 2**24).to(torch.int64)
    noise = normals(stream, 3072)
    assert noise.shape == (64, 3072)
    count = noise.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise.double() ** power).mean() - moment) < 5 * math.sqrt(spread / count)
    assert noise.abs().max() < 4.9
    # Neighbouring values, the two halves that share a hash, and different images.
    for left, right in (
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :1536], noise[:, 1536:]),
        (noise[1:], noise[:-1]),
    ):
        assert abs(np.corrcoef(left.flatten(), right.flatten())[0, 1]) < 5 / math.sqrt(left.numel())


def test_normals_are_a_function_of_the_row_alone():
    stream = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert torch.equal(normals(stream, 33)[[2, 0]], normals(stream[[2, 0]], 33))
    assert not torch.equal(normals(stream[:1], 33), normals(stream[:1, [1, 0]], 33))

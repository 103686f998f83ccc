"""The largest values, whichever way they are found."""

import numpy as np
import pytest
import torch

from memory_bank import top
from memory_bank.top import largest


@pytest.mark.parametrize("large", [1, 1 << 30])  # by threads, or not
@pytest.mark.parametrize(
    ("shape", "k"), [((5, 300), 200), ((5, 300), 300), ((5, 300), 2), ((300,), 64), ((3, 1), 1)]
)
def test_equals_a_sort(monkeypatch, shape, k, large):
    monkeypatch.setattr(top, "_LARGE", large)
    monkeypatch.setattr(top.torch, "get_num_threads", lambda: 6)
    generator = torch.Generator().manual_seed(0)
    for values in (
        torch.randn(shape, generator=generator),
        torch.randint(-(2**33), 2**33, shape, generator=generator) << 28,
    ):
        found, place = top.largest(values, k)
        expected = np.sort(values.numpy(), axis=-1)[..., ::-1][..., :k]
        np.testing.assert_array_equal(found.numpy(), expected)
        assert torch.equal(values.gather(-1, place), found)


def test_ties_name_different_places():
    values = torch.full((2, 50), -torch.inf)
    values[:, 7] = 1.0
    found, place = largest(values, 20)
    assert found.tolist() == [[1.0] + 19 * [-torch.inf]] * 2
    assert place[:, 0].tolist() == [7, 7]
    assert all(len(set(row)) == 20 for row in place.tolist())


def test_numbers_that_are_not_finite_keep_their_places():
    values = torch.arange(20.0).repeat(2, 1)
    values[0, 3], values[0, 4], values[0, 5] = torch.inf, -torch.inf, torch.nan
    found, place = largest(values, 20)
    assert found[0, :2].tolist() == [torch.inf, 19.0]
    assert found[0, -2:].tolist() == [-torch.inf, -torch.inf]
    assert place[0, 0] == 3
    assert [sorted(row) for row in place.tolist()] == [list(range(20))] * 2
    assert sorted(place[0, -2:].tolist()) == [4, 5]

import numpy as np
import pytest
import torch

from contrastive.config import UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.tally import Tally, TooManyCorrupt


def make(rows, limit):
    told = []
    images = ArrayImages("set", [np.zeros((rows, 1, 1, 3), dtype=np.uint8)], 1)
    return Tally(images, limit, lambda row, reason: told.append((row, reason))), told


def add(tally, rows, bad):
    tally.report(bad)
    tally.count(rows, bad)


def test_each_bad_row_is_told_once():
    tally, told = make(100, 0.5)
    for _ in range(3):
        add(tally, torch.arange(10), {3: "torn", 4: "empty"})
    add(tally, torch.arange(10, 20), {12: "torn"})
    assert told == [(3, "torn"), (4, "empty"), (12, "torn")]


@pytest.mark.parametrize(("bad", "stops"), [(5, False), (6, True)])
def test_the_limit_is_exact_once_all_rows_were_tried(bad, stops):
    tally, _ = make(100, 0.05)
    rows = dict.fromkeys(range(bad), "torn")
    if not stops:
        return add(tally, torch.arange(100), rows)
    with pytest.raises(TooManyCorrupt) as caught:
        add(tally, torch.arange(100), rows)
    message = str(caught.value)
    assert "6 of 100 images tried so far (of 100)" in message
    assert "data.max_corrupt=0.05 allows 5.0%" in message
    assert "set/0: torn; set/1: torn; set/2: torn)" in message
    assert isinstance(caught.value, UserError)


def test_none_allowed_stops_at_the_first():
    tally, told = make(1000, 0.0)
    with pytest.raises(TooManyCorrupt):
        add(tally, torch.arange(10), {3: "torn"})
    assert told == [(3, "torn")]


def test_a_rotten_large_set_stops_long_before_its_end():
    """Half of a million is bad: known after a batch or two, not after 5% of a million bad ones."""
    tally, told = make(1_000_000, 0.05)
    add(tally, torch.arange(8), dict.fromkeys(range(0, 8, 2), "x"))  # so few may be chance
    with pytest.raises(TooManyCorrupt, match=r"36 of 72 images tried so far \(of 1000000\)"):
        add(tally, torch.arange(8, 72), dict.fromkeys(range(8, 72, 2), "x"))
    assert len(told) == 36


def test_chance_does_not_stop_a_set_within_the_limit():
    """4% bad in random order, 5% allowed: no false alarm in 40 runs of 4,000 rows."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        order, bad = torch.randperm(4000, generator=generator), 160
        tally, told = make(4000, 0.05)
        for ids in order.split(100):
            add(tally, ids, {row: "x" for row in ids.tolist() if row < bad})
        assert len(told) == bad


def test_a_set_without_one_readable_image_is_the_users_mistake():
    tally, _ = make(3, 1.0)
    add(tally, torch.tensor([0, 1]), {0: "torn", 1: "torn"})
    with pytest.raises(
        UserError, match=r"none of the 3 images can be read \(set/0: torn;.*check data.root"
    ) as caught:
        add(tally, torch.tensor([2]), {2: "torn"})
    assert not isinstance(caught.value, TooManyCorrupt)


def test_videos_are_called_videos():
    tally, _ = make(3, 1.0)
    tally._images.are_videos = True
    with pytest.raises(UserError, match=r"none of the 3 videos can be read"):
        add(tally, torch.arange(3), dict.fromkeys(range(3), "torn"))


def test_rows_that_another_rank_could_not_read_count_and_are_not_reported_here():
    tally, told = make(20, 0.1)
    tally.report({3: "torn"})
    tally.count(torch.arange(10), [3, 7])
    assert told == [(3, "torn")]
    with pytest.raises(
        TooManyCorrupt, match=r"3 of 20 .*\(set/3: torn; set/7: found by another rank; set/12"
    ):
        tally.count(torch.arange(10, 20), [12])

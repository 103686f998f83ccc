import numpy as np
import pytest
import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import open_dataset
from contrastive.data.moving_digits import FRAMES, MOTIONS

ALL = np.arange(FRAMES)


@pytest.fixture(scope="module")
def opened():
    return open_dataset(DataConfig(name="moving_digits", image_size=24, frames=8))


def row_of(images, motion, number=0):
    return int((images.labels == MOTIONS.index(motion)).nonzero()[number])


def middle(frame):
    """Return the mean angle around each axis, in turns: the frame's borders are joined."""
    weight = frame[0].double() / 255
    turns = (torch.arange(24).double() + 0.5) / 24 * 2 * np.pi
    return [
        float(torch.atan2(w @ turns.sin(), w @ turns.cos()) / (2 * np.pi))
        for w in (weight.sum(0), weight.sum(1))
    ]


def test_every_motion_is_as_often_in_both_parts(opened):
    assert (len(opened.train), len(opened.test)) == (2670, 924)
    assert opened.train.classes == list(MOTIONS)
    for part, least in ((opened.train, 333), (opened.test, 115)):
        counts = part.labels.bincount()
        assert counts.min() == least
        assert counts.max() == least + 1
    assert opened.labelled is opened.train
    keys = [{part.key(row).split("/")[1] for row in range(len(part))} for part in (opened.train, opened.test)]
    assert not keys[0] & keys[1]  # digits of the test part were never seen


def test_each_digit_is_there_twice_once_backwards(opened):
    for row in range(0, 40, 2):
        there = opened.train.read_frames(row, ALL)
        back = opened.train.read_frames(row + 1, ALL)
        assert torch.equal(there.flip(0), back)
        assert opened.train.labels[row + 1] == opened.train.labels[row] + 1
    assert opened.train.key(0).split("/")[2] == MOTIONS[int(opened.train.labels[0])]


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("right", 0, 1), ("left", 0, -1), ("down", 1, 1), ("up", 1, -1)]
)
def test_digits_go_where_their_label_says(opened, motion, axis, sign):
    frames = opened.train.read_frames(row_of(opened.train, motion, 3), ALL)
    places = np.array([middle(frame) for frame in frames])
    steps = (np.diff(places, axis=0) + 0.5) % 1 - 0.5
    assert (sign * steps[:, axis] > 1 / 24).all()  # the slowest comes round in 20 frames, the fastest in 12
    assert (sign * steps[:, axis] < 1 / 10).all()
    assert np.abs(steps[:, 1 - axis]).max() < 0.02


def test_digits_grow_and_shrink_and_turn(opened):
    def sizes(motion):
        frames = opened.train.read_frames(row_of(opened.train, motion, 1), ALL)
        return (frames[:, 0] > 60).sum((1, 2)).double().diff()

    assert (sizes("grow") >= 0).sum() > 18  # and now and then a jump back
    assert (sizes("shrink") <= 0).sum() > 18
    turned = opened.train.read_frames(row_of(opened.train, "turn", 1), ALL)[:, 0].double()
    assert (turned.sum((1, 2)).std() / turned.sum((1, 2)).mean()) < 0.05
    assert (turned[1:] - turned[:-1]).abs().mean() > 2


def test_they_are_the_same_whenever_they_are_drawn(opened):
    again = open_dataset(DataConfig(name="moving_digits", image_size=24, frames=8))
    assert again.train.row_identity_hash() == opened.train.row_identity_hash()
    for row in (0, 5, 2669):
        assert torch.equal(again.train.read(row), opened.train.read(row))
    some = opened.train.read_frames(8, np.array([5, 3, 5]))
    assert torch.equal(some, opened.train.read_frames(8, ALL)[[5, 3, 5]])
    assert some.float().std() > 20
    assert opened.train.times(0)[-1] == pytest.approx((FRAMES - 1) / 12)


def test_a_folder_is_refused():
    with pytest.raises(UserError, match="reads no folder"):
        open_dataset(DataConfig(name="moving_digits", root="videos", frames=8))

import pytest
import torch
from torch import nn

from eval.blind_to_time import ShuffledFrames, SingleFrame

CLIPS = torch.rand(5, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class InOrder(nn.Module):
    """Features that tell the frames and their order."""

    def forward(self, clips):
        return clips.mean((2, 3, 4))


def test_a_single_frame_stands_still():
    found = SingleFrame(InOrder())(CLIPS)
    assert torch.equal(found, InOrder()(CLIPS)[:, 3:4].expand(-1, 6))


def test_shuffled_frames_are_the_same_frames_in_one_order_whatever_the_given_one():
    shuffled = ShuffledFrames(InOrder())
    found = shuffled(CLIPS)
    for seed in range(3):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(shuffled(CLIPS[:, order]), found)
    assert torch.equal(found.sort(1).values, InOrder()(CLIPS).sort(1).values)
    assert not torch.equal(found, InOrder()(CLIPS))
    assert torch.equal(shuffled(CLIPS[2:3]), found[2:3])  # whatever else is in the batch


def test_neither_changes_or_hides_the_encoder():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6 * 3 * 64, 4))
    for wrap in (SingleFrame, ShuffledFrames):
        assert [*wrap(encoder).parameters()] == [*encoder.parameters()]
        assert wrap(encoder)(CLIPS).shape == (5, 4)


@pytest.mark.parametrize("wrap", [SingleFrame, ShuffledFrames])
def test_a_clip_and_its_reverse(wrap):
    """Only the single frame of an odd number of frames is its own reverse's; the shuffled ones always are."""
    both = [wrap(InOrder())(clips) for clips in (CLIPS[:, :5], CLIPS[:, :5].flip(1))]
    assert torch.equal(*both)

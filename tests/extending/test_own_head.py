"""Join the features of a clip's frames in your own way: a temporal head, named in the registry."""

import torch
from torch import nn

from contrastive.encoders.temporal import TemporalHead
from contrastive.encoders.weights import load_encoder
from contrastive.pretrain import pretrain
from contrastive.registry import TEMPORAL_HEADS
from tests import tiny
from tests.contrastive.callbacks.fits import quiet

pytestmark = quiet


class Strongest(TemporalHead):
    """The largest value of each feature, weighed; a frame counts by how many features it has the largest of.

    Args:
        dim_in: Size of a frame's features.
        scale: First weight of each feature.
    """

    def __init__(self, dim_in, *, scale=1.0):
        super().__init__()
        self.dim = dim_in
        self.weight = nn.Parameter(torch.full((dim_in,), float(scale)))

    def forward(self, frames):
        largest, frame = frames.max(1)
        counts = torch.zeros(frames.shape[:2]).scatter_add(1, frame, torch.ones_like(largest))
        return self.weight * largest, counts / self.dim


def test_it_is_chosen_by_name_trained_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(TEMPORAL_HEADS, "strongest", f"{__name__}:Strongest")
    clips = ("data.name=moving_digits", "data.frames=3", "schedule.epochs=1", "trainer.max_steps=2")
    head = ("encoder.temporal=strongest", "encoder.temporal_args={scale: 2}")
    code, _ = pretrain(tiny.run_config(tmp_path, *clips, *head))
    assert code == 0
    encoder, info = load_encoder(tmp_path / "runs/tiny/encoder.safetensors")
    assert (info.arch.temporal, info.arch.temporal_args, info.input.frames) == ("strongest", {"scale": 2}, 3)
    assert isinstance(encoder.over_time, Strongest)
    assert not torch.equal(encoder.over_time.weight, torch.full((64,), 2.0))
    encoded = encoder.encode(torch.randn(2, 3, 3, 16, 16))
    torch.testing.assert_close(encoded.frame_weights.sum(1), torch.ones(2))
    assert encoded.pooled.shape == (2, 64)

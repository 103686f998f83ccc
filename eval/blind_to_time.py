"""Show an encoder clips without their time: one frame, or all frames in an order that says nothing."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SingleFrame(nn.Module):
    """An encoder that sees the middle frame of each clip, in place of all of them.

    Args:
        encoder: Network from clips to features.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, views: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute the features of a clip that stands still."""
        middle = views[:, views.shape[1] // 2, None]
        features: Tensor = self.encoder(middle.expand_as(views))
        return features


class ShuffledFrames(nn.Module):
    """An encoder that sees the frames of each clip in an order that depends on the set of frames alone.

    Frames are sorted by a fixed random projection of their pixels: whatever order they are given in, the
    features are the same, so these features are blind to the order of time, and no random number decides a
    score.

    Args:
        encoder: Network from clips to features.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, views: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute the features of the sorted frames."""
        frames = views.flatten(2)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(frames.shape[2], generator=generator, dtype=torch.float64).to(frames.device)
        order = (frames.double() @ weights).argsort(dim=1)
        features: Tensor = self.encoder(views[torch.arange(len(views))[:, None], order])
        return features

"""Encode clips frame by frame: an image encoder under a head that joins its features over time."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from contrastive.encoders.encoder import Encoded, Encoder, as_clips

TEMPORAL_HEAD = "over_time"
"""Name of the head in the names of a TemporalEncoder's tensors."""


class TemporalHead(nn.Module, ABC):
    """Base class of temporal heads; a subclass sets ``dim``, its feature size, and implements ``forward``.

    Attributes:
        dim: Size of its features.
        sees_order: Whether its features depend on the order of the frames.
    """

    dim: int
    sees_order: ClassVar[bool] = True

    @abstractmethod
    def forward(self, frames: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t"]]:
        """Join the features of a clip's frames.

        Returns:
            One vector a clip; and the weight of each frame in it, which sum to 1.
        """


class TemporalEncoder(Encoder):
    """An image encoder under a temporal head; both are trained, saved and measured as one encoder.

    All frames of all clips go through the image encoder in one call, as a batch of b * t images, so its
    activations take t times the memory of b images. Its batch norms see all of them as one batch.

    Args:
        image: Encoder of the frames.
        head: Takes features of ``image.dim``.
    """

    takes_clips = True

    def __init__(self, image: Encoder, head: TemporalHead) -> None:
        super().__init__()
        self.image, self.over_time = image, head
        self.dim, self.weight_names = head.dim, image.weight_names
        self.classifier_names = image.classifier_names

    @property
    @override
    def image_encoder(self) -> Encoder:
        return self.image

    @override
    def encode(self, x: Float[Tensor, "b *t 3 h w"]) -> Encoded:
        """Encode clips, or images as clips of one frame; tokens are the features of the frames."""
        frames = self.encode_frames(x)
        pooled, weights = self.over_time(frames)
        return Encoded(pooled, frames, None, frame_weights=weights)

    @override
    def encode_frames(self, x: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b t d"]:
        clips = as_clips(x)
        frames: Tensor = self.image(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return frames

    @override
    def join(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b e"]:
        pooled: Tensor = self.over_time(frames)[0]
        return pooled

"""Define the interface of all encoders."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

from jaxtyping import Float
from torch import Tensor, nn

from contrastive.encoders.spec import OWN, ArchSpec


@dataclass
class Encoded:
    """Features of a batch.

    Attributes:
        pooled: One vector per image or clip, the input of the projector and of evaluation protocols.
        tokens: The vectors it was pooled from: positions of a feature map row by row (of a clip, frame by
            frame), or a class token (if there is one) and the patches of a transformer. Their width is that
            of ``pooled``, except in networks with a layer after the pooling.
        grid: Rows and columns of the positions or patches; None if they form no rectangle. There are
            ``n - rows * columns`` class tokens.
        attention: Softmax weights of each block, the first one first, over the m tokens inside the network:
            ``n``, and registers between class token and patches. Filled by ``encode_with_attention`` alone;
            None too if the network has no such blocks, or some that do not attend to all tokens.
        frame_weights: Share of each frame of a clip in ``pooled``; rows sum to 1. None but of networks under
            a temporal head.
    """

    pooled: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b n c"]
    grid: tuple[int, int] | None
    attention: tuple[Float[Tensor, "b _ m m"], ...] | None = None
    frame_weights: Float[Tensor, "b t"] | None = None


class Encoder(nn.Module, ABC):
    """Base class of encoders; a subclass sets ``dim`` and implements ``encode``.

    Attributes:
        dim: Size d of the pooled vector.
        arch: Description to rebuild the network. The functions of the registry set it; None means a class of
            your own, an instance of which must be passed to functions that load its file.
        classifier_names: Names of the classifier in weight files, which is left out.
        weight_names: Allowed values of ``encoder.weights`` besides a file; see ``published_weights``.
        takes_clips: Whether it takes clips (b, t, 3, h, w), and images as clips of one frame. Others take
            images only, and clips under a temporal head (contrastive/encoders/temporal.py).
    """

    dim: int
    arch: ArchSpec | None = None
    classifier_names: tuple[str, ...] = ("fc",)
    weight_names: tuple[str, ...] = ()
    takes_clips: bool = False

    @property
    def image_encoder(self) -> "Encoder":
        """Return the part that encodes single frames, if it is under a temporal head; else the encoder."""
        return self

    @abstractmethod
    def encode(self, x: Float[Tensor, "b *t 3 h w"]) -> Encoded:
        """Compute pooled features and the tokens they were pooled from."""

    def forward(self, x: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute only the pooled features."""
        return self.encode(x).pooled

    def encode_frames(self, x: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b ..."]:
        """Compute of each frame all that does not depend on the others; by default these are the pixels.

        So clips whose frames were only put into another order need no second pass of this part.
        """
        return x

    def join(self, frames: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Compute the pooled features from what ``encode_frames`` returned, its frames in any order."""
        features: Tensor = self(frames)
        return features

    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Return the weights that the network's library publishes under one of ``weight_names``."""
        raise NotImplementedError(f"{type(self).__name__}: weight_names is {self.weight_names}")

    @property
    def spec(self) -> ArchSpec:
        """Return ``arch``, or the name of the class if the registry cannot build it."""
        return self.arch or ArchSpec(f"{OWN}{type(self).__name__}")


def encode_map(pooled: Float[Tensor, "b d"], features: Float[Tensor, "b c h w"]) -> Encoded:
    """Return the positions of a feature map as tokens, row by row."""
    return Encoded(pooled, features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3]))


def encode_volume(pooled: Float[Tensor, "b d"], features: Float[Tensor, "b c t h w"]) -> Encoded:
    """Return the positions of a clip's features as tokens, frame by frame; a grid only of a single frame."""
    frames, rows, columns = features.shape[2:]
    return Encoded(pooled, features.flatten(2).transpose(1, 2), (rows, columns) if frames == 1 else None)


def as_clips(x: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """Return clips as they are, and images as clips of one frame."""
    return x if x.ndim == 5 else x[:, None]


def grid_of(patches: int, x: Float[Tensor, "b 3 h w"]) -> tuple[int, int] | None:
    """Return rows and columns of ``patches``, in the proportions of the images; None if none fit."""
    height, width = x.shape[-2:]
    rows = max(1, isqrt(patches * height // width))
    columns = patches // rows
    return (rows, columns) if rows * columns == patches and rows * width == columns * height else None

"""The interface of every encoder, whatever its architecture."""

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
        pooled: One vector an image; what protocols and the projector read.
        tokens: The parts it was pooled from: positions of a feature map row by row, or a class token (where
            there is one) before the patches of a transformer. Their width is that of ``pooled``, except in
            networks with a layer behind the pooling.
        grid: Rows and columns of the positions or patches; None where they form no rectangle. There are
            ``n - rows * columns`` class tokens.
        attention: Weights of the attention, where an encoder computes them.
    """

    pooled: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b n c"]
    grid: tuple[int, int] | None
    attention: Tensor | None = None


class Encoder(nn.Module, ABC):
    """Computes features of images; a subclass sets ``dim`` and writes ``encode``.

    Attributes:
        dim: Size d of the pooled vector.
        arch: How to build the network again. The functions of the registry set it; None stands for a class
            of your own, which is passed to whatever loads its file.
        heads: Names of the classifier in weight files, which are left out.
        weight_names: What ``encoder.weights`` may be beside a file; see ``published_weights``.
    """

    dim: int
    arch: ArchSpec | None = None
    heads: tuple[str, ...] = ("fc",)
    weight_names: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        """Compute pooled features and the tokens they were pooled from."""

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute the pooled features alone."""
        return self.encode(x).pooled

    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Return the tensors that the network's library publishes as one of ``weight_names``."""
        raise NotImplementedError(f"{type(self).__name__}: weight_names is {self.weight_names}")

    @property
    def spec(self) -> ArchSpec:
        """Return ``arch``, or the name of the class where the registry cannot build it."""
        return self.arch or ArchSpec(f"{OWN}{type(self).__name__}")


def encode_map(pooled: Float[Tensor, "b d"], features: Float[Tensor, "b c h w"]) -> Encoded:
    """Return the positions of a feature map as tokens, row by row."""
    return Encoded(pooled, features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3]))


def grid_of(patches: int, x: Float[Tensor, "b 3 h w"]) -> tuple[int, int] | None:
    """Return rows and columns of so many patches, in the proportions of the images; None where none fit."""
    height, width = x.shape[-2:]
    rows = max(1, isqrt(patches * height // width))
    columns = patches // rows
    return (rows, columns) if rows * columns == patches and rows * width == columns * height else None

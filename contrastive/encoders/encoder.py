"""What every encoder offers, whatever its architecture."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Images to features; a subclass writes ``encode``.

    Callers see a pooled vector and, on request, the tokens it was made from: the positions of a
    convolutional feature map, the patches of a transformer, the space-time patches of a clip. So none
    of them depends on the architecture.

    Attributes:
        dim: Size d of the pooled vector and of each token.
    """

    dim: int

    @abstractmethod
    def encode(self, images: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b t d"]]:
        """Pooled features and tokens; tokens should cost no more than a view of what pooling read."""

    def forward(
        self, images: Float[Tensor, "b ..."], tokens: bool = False
    ) -> Float[Tensor, "b d"] | tuple[Float[Tensor, "b d"], Float[Tensor, "b t d"]]:
        """Pooled features ``(b, d)``; with ``tokens=True`` also the tokens ``(b, t, d)``."""
        pooled, parts = self.encode(images)
        return (pooled, parts) if tokens else pooled

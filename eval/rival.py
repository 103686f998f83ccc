"""Open networks of somebody else's to compare an encoder with, on the encoder's views."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.config import DataConfig, UserError
from contrastive.encoders.spec import InputSpec
from eval.frozen import open_frozen, resolve
from eval.subject import Extractor


def open_rival(setting: str, text: str, extractor: Extractor) -> nn.Module:
    """Open a network to compare with, so that it takes the encoder's views.

    Args:
        setting: Name of the setting, for messages.
        text: What ``checkpoint`` may be.
        extractor: Has the encoder.

    Raises:
        UserError: it cannot be opened, or takes images of another size.
    """
    size = extractor.data.image_size
    other = open_frozen(resolve(text), image_size=size, seed=extractor.config.baselines.random_seed)
    if other.input.size != size:
        raise UserError(
            f"{setting}: {text} takes images of {other.input.size} px, the encoder {size} px; compare "
            "networks of the same size, or name one of another library, which takes any"
        )
    return Renormalised(other.module, _normalisation(extractor.data), _normalisation(other.input))


def _normalisation(spec: DataConfig | InputSpec) -> Float[Tensor, "2 3 1 1"]:
    """Return mean and standard deviation of each channel."""
    return torch.tensor([spec.mean, spec.std])[..., None, None]


class Renormalised(nn.Module):
    """Feed a network with views that are normalised for another one.

    Args:
        module: The network.
        given: Mean and standard deviation of each channel by which the views are normalised.
        wanted: Those that ``module`` expects.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, module: nn.Module, given: Float[Tensor, "2 3 1 1"], wanted: Float[Tensor, "2 3 1 1"]
    ) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("scale", given[1] / wanted[1])
        self.register_buffer("shift", (given[0] - wanted[0]) / wanted[1])

    def forward(self, views: Float[Tensor, "b *t 3 s s"]) -> Float[Tensor, "b d"]:
        """Compute the features."""
        features: Tensor = self.module(views * self.scale + self.shift)
        return features

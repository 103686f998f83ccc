"""Describe the encoder to export, and check that a copy computes the same features."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.encoders.encoder import Encoder
from contrastive.encoders.spec import ArchSpec, InputSpec

_TOLERANCE = 1e-4  # relative to the largest feature: other libraries sum in another order


@dataclass(frozen=True)
class ExportedEncoder:
    """An encoder and its origin.

    Attributes:
        encoder: The network, in evaluation mode, on the CPU.
        arch: Description of the network.
        input: Description of its input.
        file: Its encoder.safetensors.
        sha256: SHA-256 of the file.
        run: The run directory, None if unknown.
    """

    encoder: Encoder
    arch: ArchSpec
    input: InputSpec
    file: Path
    sha256: str
    run: Path | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (3, s, s), or (t, 3, s, s) for clips."""
        square = (3, self.input.size, self.input.size)
        return (self.input.frames, *square) if self.input.frames > 1 else square

    def compare(self, other: Callable[[Float[Tensor, "b *t 3 s s"]], Tensor]) -> float:
        """Compute the largest difference of ``other``'s features, relative to the encoder's largest feature.

        Args:
            other: Function from pixels in [0, 1] to features; called with random images.

        Raises:
            RuntimeError: the difference is larger than another order of summation explains.
        """
        pixels = torch.rand(3, *self.shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours, theirs = self.encoder(self.normalize(pixels)), other(pixels)
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
        if not difference <= _TOLERANCE:
            raise RuntimeError(
                f"the exported network's features differ from the encoder's by {difference:.2g}"
            )
        return difference

    def normalize(self, pixels: Float[Tensor, "b *t 3 s s"]) -> Float[Tensor, "b *t 3 s s"]:
        """Normalise as for the encoder: (pixels - mean) / std."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.input.mean, self.input.std))
        return (pixels - mean) / std

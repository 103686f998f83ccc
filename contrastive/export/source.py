"""What is exported, and the proof that a copy of it is the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.encoders.encoder import Encoder
from contrastive.encoders.spec import ArchSpec, InputSpec

_TOLERANCE = 1e-4  # of the largest feature: other libraries order the same sums differently


@dataclass(frozen=True)
class ExportedEncoder:
    """An encoder, and where it is from.

    Attributes:
        encoder: In evaluation mode, on the CPU.
        arch: The network.
        input: The images it takes.
        file: That file.
        sha256: Of the file.
        run: The run directory, None where it is unknown.
    """

    encoder: Encoder
    arch: ArchSpec
    input: InputSpec
    file: Path
    sha256: str
    run: Path | None

    def compare(self, other: Callable[[Float[Tensor, "b 3 s s"]], Tensor]) -> float:
        """Largest difference of the features of ``other`` to the encoder's, relative to the largest feature.

        Args:
            other: Gets pixels in [0, 1], of random images.

        Raises:
            RuntimeError: it is more than sums in another order explain.
        """
        side = self.input.size
        pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours, theirs = self.encoder(self.normalize(pixels)), other(pixels)
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
        if not difference <= _TOLERANCE:
            raise RuntimeError(
                f"the exported network's features differ from the encoder's by {difference:.2g}"
            )
        return difference

    def normalize(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """As the encoder was fed: (pixels - mean) / std."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.input.mean, self.input.std))
        return (pixels - mean) / std

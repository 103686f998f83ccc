"""Compute how much of a clip's feature comes from each frame, and draw it below the frames."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, UserError
from contrastive.drawing.canvas import Drawing
from contrastive.drawing.over_time import time_sheet
from contrastive.encoders.encoder import Encoder
from eval.attention_maps import seen_pixels

_LEAST = 2.0  # end of the scale, in even spreads, where no weight is larger


def middle_clip(pixels: UInt8[Tensor, "b f 3 S S"], data: DataConfig) -> UInt8[Tensor, "b t 3 S S"]:
    """Return one of the clips that evaluation takes of a video, the middle one."""
    start = pixels.shape[1] // data.frames // 2 * data.frames
    return pixels[:, start : start + data.frames]


@torch.no_grad()
def compute_weights(
    encoder: Encoder, pixels: UInt8[Tensor, "b t 3 S S"], data: DataConfig
) -> Float[Tensor, "b t"]:
    """Compute the weights that the temporal head of an encoder gives to the frames of clips, on the CPU.

    Args:
        encoder: In evaluation mode.
        pixels: Stored frames.
        data: How views are cut and normalised.

    Raises:
        UserError: the encoder has no head that weighs frames, or weights are not finite.
    """
    arch = encoder.spec
    if arch.temporal in ("", "mean"):
        reason = "has no temporal head" if not arch.temporal else "weighs all frames alike"
        raise UserError(
            f"{arch}: {reason}, so there are no weights over time to draw; train an encoder of images with "
            "encoder.temporal=attention or nuta"
        )
    device = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
    weights = encoder.encode(center_view(pixels.to(device), data)).frame_weights
    assert weights is not None
    finite = weights.isfinite().all(1)
    if not finite.all():
        raise UserError(
            f"{arch}: weights of {int((~finite).sum())} of {len(finite)} clips are NaN or infinite; take an "
            "earlier checkpoint (runs/NAME/checkpoints/step-N)"
        )
    return weights.float().cpu()


def draw_weights(
    found: Mapping[str, Float[Tensor, "b t"]], pixels: UInt8[Tensor, "b t 3 S S"], data: DataConfig
) -> list[Drawing]:
    """Draw a sheet for each clip: its frames and, in a row for each network, a bar below each of them.

    Args:
        found: Weights of these clips by network.
        pixels: Stored frames.
        data: How views are cut.
    """
    highest = max(_LEAST, *(float(weights.max()) * pixels.shape[1] for weights in found.values()))
    shown = seen_pixels(pixels, data)
    return [
        time_sheet(clip, {name.replace("_", " "): weights[row] for name, weights in found.items()}, highest)
        for row, clip in enumerate(shown)
    ]

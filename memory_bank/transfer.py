"""Copy tensors to a device without a device sync."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` from the host to ``device``.

    A plain copy to a GPU waits until the GPU has finished all queued work; a copy from pinned memory is
    queued behind it.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)

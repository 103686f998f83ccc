"""The batch of the training path: pixels and row numbers. It has no labels, by design."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of one rank.

    b may be smaller than planned, down to 0, if images could not be read: rows are left out, never
    replaced, and the number of batches never changes.

    Attributes:
        images: RGB pixels, uint8; of clips the frames of all views (b, f, 3, s, s), one view after the other;
            of crops of the original (b, n): those of all views (s, s, 3), flattened, one after the other.
        ids: Data set rows, int64.
    """

    images: UInt8[Tensor, "b *f 3 s s"] | UInt8[Tensor, "b n"]
    ids: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """Copy to ``device``; by default without blocking if that is safe (from pinned memory)."""
        if non_blocking is None:
            non_blocking = self.images.device.type == "cpu" and self.images.is_pinned()
        return Batch(
            self.images.to(device, non_blocking=non_blocking), self.ids.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory; called by the DataLoader's pinning thread."""
        return Batch(self.images.pin_memory(), self.ids.pin_memory())

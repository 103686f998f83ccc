"""Draw where each view is cut from an image, before the image is decoded."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.augment.crop import Crop
from contrastive.augment.views import Views
from contrastive.config import AugmentConfig, DataConfig


class DrawBoxes:
    """Draws the box of each view of a row: a pure function of (seed, epoch, row) and the image's size.

    They are the boxes that ``Views`` draws on an image of this size.

    Args:
        augment: The views.
        data: Its ``image_size`` is used.
        seed: In [0, 2**32).

    Attributes:
        sides: Side in pixels that each view is cut to.
    """

    def __init__(self, augment: AugmentConfig, data: DataConfig, seed: int) -> None:
        self._views = Views(augment, data, seed)
        self.sides = self._views.sides
        # Views of the same distribution are drawn together: small tensors take as long as tiny ones.
        crops = [(chain.crop, number < 2) for number, chain in enumerate(self._views.chains)]
        alike = groupby(crops, key=lambda crop: (crop[0].scale, crop[0].ratio, crop[1]))
        self._groups = [[crop for crop, _ in group] for _, group in alike]

    def __call__(
        self, rows: Int[Tensor, " b"], epoch: int
    ) -> Iterator[Callable[[int, int], Float[Tensor, "v 4"]]]:
        """Yield for each row a function from height and width to its boxes, see ``draw_boxes``.

        Args:
            rows: Data set rows, on the CPU.
            epoch: From 0.
        """
        numbers = torch.stack(self._views.numbers(rows, epoch, len(self.sides), Crop.num_box), dim=1)
        halves = [half for half in self._views.halves(rows, epoch) if half is not None]
        of_global = torch.stack(halves, dim=1) if halves else [None] * len(rows)
        for drawn, half in zip(numbers, of_global, strict=True):
            yield partial(self._boxes, drawn, half)

    def _boxes(
        self, numbers: Float[Tensor, "v u"], half: Int[Tensor, " g"] | None, height: int, width: int
    ) -> Float[Tensor, "v 4"]:
        found, start = [], 0
        for crops in self._groups:
            here = slice(start, start := start + len(crops))
            halves = None if half is None or here.start >= len(half) else half[here]
            found.append(crops[0].boxes(numbers[here], height, width, halves))
        return torch.cat(found)

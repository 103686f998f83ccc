"""Images of a torch Dataset of your own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.arrays import hash_pixels
from contrastive.data.decode import Unreadable, to_rgb, to_square, to_tensor
from contrastive.data.images import Images


class DatasetImages(Images):
    """A map-style Dataset of your own: ``dataset[i]`` is a PIL image or a uint8 (3, h, w) tensor.

    Of a tuple (image, label, ...) the first item is used. If ``dataset[i]`` raises, that row counts as
    unreadable.

    A resume is refused if the number of rows differs. Altered images are detected too if the dataset has a
    method ``stamp(row)`` that returns a string which changes with the image (a file's size, a hash). Caches
    of features and of decoded images then use it as well; without it they decode every image to hash it.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        size: Side of the images that ``read`` returns.
        name: Keys are ``name/row``.
        labels: Class of each row for monitors and evaluation, -1 where unknown; None without classes.
        classes: Names of the classes; None numbers them.

    Raises:
        UserError: the number of labels differs from the number of rows.
    """

    thread_safe = False  # a Dataset need not be: torch reads it from processes
    has_originals = True

    def __init__(
        self,
        dataset: Any,
        size: int,
        *,
        name: str = "dataset",
        labels: Sequence[int] | Int[Tensor, " n"] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.dataset, self.size, self.name, self.classes = dataset, size, name, classes
        if labels is None:
            return
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if len(self.labels) != len(dataset):
            raise UserError(
                f"labels: {len(self.labels)} for {len(dataset)} images; give one a row, -1 where unknown"
            )
        if classes is None:
            self.classes = [str(number) for number in range(max([-1, *self.labels.tolist()]) + 1)]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> UInt8[Tensor, "3 s s"]:
        """See Images."""
        return to_tensor(to_square(to_rgb(self.open(row), self.white), self.size))

    def open(self, row: int) -> Image.Image:
        """See Images."""
        try:
            item = self.dataset[row]
        except Exception as error:  # the user's code; whatever it raises concerns this row alone
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        if isinstance(image, Image.Image):
            if not (image.width and image.height):
                raise Unreadable(f"no pixels ({image.width}x{image.height})")
            return image
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{self.name}[{row}] is {given}: a PIL image or a uint8 (3, h, w) tensor is needed")

    def key(self, row: int) -> str:
        """Return e.g. ``dataset/17``."""
        return f"{self.name}/{row}"

    def stamp(self, row: int) -> str:
        """Return the dataset's own stamp, or nothing if it has none."""
        return str(self.dataset.stamp(row)) if self._has_stamps else ""

    def content(self, row: int) -> str:
        """Return the dataset's own stamp, or a hash of the decoded pixels."""
        if self._has_stamps:
            return self.stamp(row)
        try:
            return hash_pixels(self.read(row).numpy())
        except Unreadable:
            return "unreadable"

    @property
    def _has_stamps(self) -> bool:
        return callable(getattr(self.dataset, "stamp", None))

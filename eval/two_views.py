"""Compute features of training images and of two random views of each, by the run's augmentation."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.augment.moments import DrawMoments
from contrastive.augment.views import Views
from contrastive.config import AugmentConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.clips import draw_clips
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from eval.subject import Extractor


@dataclass(frozen=True)
class TwoViews:
    """Features of the same images, on the extractor's device.

    Attributes:
        centre: Of the centre views, not normalised.
        first: Of one random view each, of unit norm.
        second: Of another one.
    """

    centre: Float[Tensor, "n d"]
    first: Float[Tensor, "n d"]
    second: Float[Tensor, "n d"]


class ViewSampler:
    """Decode training images, spread evenly over the rows, and compute their features by any network.

    Args:
        extractor: The networks and the images.
        most: Largest number of images.
        batch_size: Images of a forward pass.

    Attributes:
        augment: The augmentation: that of the run, or the default if the run is not known.

    Raises:
        UserError: fewer than two images can be read.
    """

    def __init__(self, extractor: Extractor, most: int, batch_size: int) -> None:
        self.augment = _augment_of(extractor.location.run)
        self._extractor, self._batch_size = extractor, batch_size
        known = extractor.part_features("encoder")["train"]
        if len(known) < 2:
            raise UserError(f"the training part has {len(known)} readable images, statistics need 2 or more")
        self._most, self._rows = most, known.spread(most).rows
        moments = DrawMoments(self.augment.time, seed=0)
        images = draw_clips(SomeImages(extractor.parts["train"], self._rows), extractor.data, moments)
        self._pixels = decode_all(images).images
        self._views = Views(self.augment, extractor.data, seed=0)

    def features(self, name: str) -> TwoViews:
        """Return the features by one of the extractor's ``modules``."""
        extractor = self._extractor
        centre = extractor.part_features(name)["train"].spread(self._most).features.to(extractor.device)
        return TwoViews(centre, *self._two_views(extractor.modules()[name]().to(extractor.device)))

    @torch.inference_mode()
    def _two_views(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        both: tuple[list[Tensor], list[Tensor]] = ([], [])
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        parts = (torch.split(part, self._batch_size) for part in (self._pixels, self._rows))
        for images, ids in zip(*parts, strict=True):
            views = self._views(images.to(device), ids.to(device), 0)[:2]
            for features, view in zip(both, views, strict=True):
                features.append(F.normalize(module(view).float()))
        return torch.cat(both[0]), torch.cat(both[1])


def _augment_of(run: Path | None) -> AugmentConfig:
    """Return the augmentation that the encoder was trained with; the default where it is not known."""
    return AugmentConfig() if run is None else load_saved(PretrainConfig, run / "config.yaml").augment

"""What all augmentations share: Kornia modules whose parameters are a function of given uniforms."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from torch import Tensor

from memory_bank.shapes import Bool, Float

Params = dict[str, Tensor]


class Intensity(IntensityAugmentationBase2D, ABC):
    """A change of pixel values that some images get and others do not.

    Parameters are drawn per image from ``num_uniforms`` uniforms; the first decides whether the image is
    changed. Called without ``params``, as Kornia's containers do, the uniforms come from torch's global
    generator; ``params=op.draw(uniforms)`` uses none. Runs in float32 also under autocast, and without
    gradient. Values are expected in [0, 1].

    Kornia computes the change for every image and then selects. Here images that are not chosen cost
    nothing on a CPU; elsewhere that would need a transfer to the host, so the change is computed for all.
    """

    num_uniforms: ClassVar[int]

    def __init__(self, p: float) -> None:
        super().__init__(p=p, p_batch=1.0, same_on_batch=False, keepdim=False)

    def draw(self, uniforms: Float[Tensor, "b u"]) -> Params:
        """Kornia's parameter dictionary from uniforms in [0, 1); ``batch_prob`` is the choice."""
        return {"batch_prob": uniforms[:, 0] < self.p, **self.strengths(uniforms[:, 1:])}

    @abstractmethod
    def strengths(self, uniforms: Float[Tensor, "b v"]) -> Params:
        """Per-image parameters of ``change``, by name."""

    @abstractmethod
    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """The change of the chosen images; must leave its input as it is."""

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Kornia's hook; it draws the choice itself."""
        return self.strengths(torch.rand(batch_shape[0], self.num_uniforms - 1))

    def transform_inputs(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None, **kwargs: Any
    ) -> Tensor:
        """Kornia's hook around ``apply_transform``, with the choice made before the work."""
        self.validate_tensor(input)
        strengths = {
            name: value.to(input.device) for name, value in params.items() if name not in _KORNIA_OWN
        }
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            if self.p == 1.0:
                return self.change(input.float(), **strengths).to(input.dtype)
            chosen = params["batch_prob"].to(input.device) > 0.5
            return on_chosen(self.change, input.float(), chosen, strengths).to(input.dtype)


class Geometric(GeometricAugmentationBase2D):
    """A change of where pixels are, for every image; otherwise as Intensity."""

    num_uniforms: ClassVar[int]

    def __init__(self) -> None:
        super().__init__(p=1.0, p_batch=1.0, same_on_batch=False, keepdim=False)


_KORNIA_OWN = ("batch_prob", "forward_input_shape", "data_keys")


def on_chosen(
    change: Callable[..., Tensor],
    images: Float[Tensor, "b 3 h w"],
    chosen: Bool[Tensor, " b"],
    strengths: Params,
) -> Float[Tensor, "b 3 h w"]:
    """``change`` of the chosen images beside the others as they were."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(chosen[:, None, None, None], change(images, **strengths), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    chosen_strengths = {name: value.index_select(0, rows) for name, value in strengths.items()}
    changed = change(images.index_select(0, rows), **chosen_strengths)
    return changed if len(rows) == len(images) else images.index_copy(0, rows, changed)

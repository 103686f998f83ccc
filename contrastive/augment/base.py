"""Base classes of augmentations: Kornia modules with parameters that are a function of given uniforms."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from torch import Tensor

Params = dict[str, Tensor]


class Intensity(IntensityAugmentationBase2D, ABC):
    """A random change of pixel values, applied to each image with a probability.

    Parameters are drawn per image from ``num_uniforms`` uniforms; the first decides whether the image is
    changed. Called without ``params``, as Kornia's containers do, the uniforms come from torch's global
    generator; ``params=op.draw(uniforms)`` uses none. Runs in float32 also under autocast, and without
    gradient. Values are expected in [0, 1].

    Kornia computes the change for every image and then selects. On a CPU, this class computes it for the
    chosen images only; elsewhere that would need a transfer to the host, so it is computed for all.
    """

    num_uniforms: ClassVar[int]

    def __init__(self, p: float) -> None:
        super().__init__(p=p, p_batch=1.0, same_on_batch=False, keepdim=False)

    def draw(self, uniforms: Float[Tensor, "b u"]) -> Params:
        """Compute Kornia's parameters from uniforms in [0, 1); ``batch_prob`` marks the chosen images."""
        return {"batch_prob": uniforms[:, 0] < self.p, **self.strengths(uniforms[:, 1:])}

    @abstractmethod
    def strengths(self, uniforms: Float[Tensor, "b v"]) -> Params:
        """Compute the parameters of ``change`` for each image, by name."""

    @abstractmethod
    def change(self, images: Float[Tensor, "n 3 h w"], **strengths: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Return the changed images; must not modify its input."""

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw parameters for Kornia, which itself draws which images are chosen."""
        return self.strengths(torch.rand(batch_shape[0], self.num_uniforms - 1))

    def transform_inputs(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None, **kwargs: Any
    ) -> Tensor:
        """Apply the change for Kornia, only to the chosen images where that saves time."""
        self.validate_tensor(input)
        moved = {name: value.to(input.device) for name, value in params.items() if name not in _KORNIA_OWN}
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            return self.overwrite(input.to(torch.float32, copy=True), moved).to(input.dtype)

    def overwrite(self, images: Float[Tensor, "b 3 h w"], params: Params) -> Float[Tensor, "b 3 h w"]:
        """Change the chosen images; may modify ``images`` in place and return it.

        Args:
            images: float32.
            params: The result of ``draw``, on the device of ``images``.
        """
        strengths = {name: value for name, value in params.items() if name != "batch_prob"}
        if self.p == 1.0:
            return self.change(images, **strengths)
        chosen = params["batch_prob"] > 0.5
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.where(chosen[:, None, None, None], self.change(images, **strengths), images)
        rows = chosen.nonzero().squeeze(1)
        if not len(rows):
            return images
        chosen_strengths = {name: value.index_select(0, rows) for name, value in strengths.items()}
        return images.index_copy_(0, rows, self.change(images.index_select(0, rows), **chosen_strengths))


class Geometric(GeometricAugmentationBase2D):
    """A random change of pixel positions, applied to every image; otherwise like Intensity."""

    num_uniforms: ClassVar[int]

    def __init__(self) -> None:
        super().__init__(p=1.0, p_batch=1.0, same_on_batch=False, keepdim=False)


_KORNIA_OWN = ("forward_input_shape", "data_keys", "video_batch_size")

"""What all augmentations share: Kornia modules whose parameters are a function of given uniforms."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from torch import Tensor

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
        held = {name: value.to(input.device) for name, value in params.items() if name not in _KORNIA_OWN}
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            return self.overwrite(input.to(torch.float32, copy=True), held).to(input.dtype)

    def overwrite(self, images: Float[Tensor, "b 3 h w"], params: Params) -> Float[Tensor, "b 3 h w"]:
        """The images, the chosen ones changed; may be ``images`` itself, with new values.

        Args:
            images: float32.
            params: As ``draw`` gives them, on the device of ``images``.
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
    """A change of where pixels are, for every image; otherwise as Intensity."""

    num_uniforms: ClassVar[int]

    def __init__(self) -> None:
        super().__init__(p=1.0, p_batch=1.0, same_on_batch=False, keepdim=False)


_KORNIA_OWN = ("forward_input_shape", "data_keys")

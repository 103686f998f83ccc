"""``torchvision:MODEL``: any classifier of torchvision, of images or of clips."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models
from torchvision.models import video
from typing_extensions import override

from contrastive.config import UserError
from contrastive.encoders.build import without_memory
from contrastive.encoders.encoder import Encoded, as_clips, encode_map, encode_volume, grid_of
from contrastive.encoders.library import (
    DEFAULT,
    LibraryEncoder,
    check_arguments,
    check_model,
    download,
    explain_refusal,
)
from contrastive.encoders.spec import InputSpec

_FIXED = {"aux_logits": False, "init_weights": True}
"""Arguments with a fixed value in the networks that have them."""
_SIZES = ("image_size", "spatial_size", "temporal_size")
_RESERVED = ("weights", "num_classes", *_SIZES, "self", "kwargs", "block", "norm_layer", *_FIXED)
"""Arguments that ``encoder.args`` must not set: fixed ones, and those that a config cannot express."""
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Auxiliary classifiers, which are not built."""
_CLIP = 16  # frames of a clip that published weights of networks of clips were trained and measured on


def build(model: str, image_size: int, /, *, frames: int = 1, **args: Any) -> LibraryEncoder:
    """Build ``torchvision:MODEL`` with random weights.

    Args:
        model: A name of ``torchvision.models.list_models()`` that ends in a linear classifier.
        image_size: Side in pixels; ``image_size`` of the networks that have it.
        frames: Frames of a clip, for the networks of ``torchvision.models.video``.
        args: Further arguments of the network's class, e.g. ``dropout``.
    """
    if takes_clips(model):
        return TorchvisionClipEncoder(model, image_size, args, frames)
    return TorchvisionEncoder(model, image_size, args)


def takes_clips(model: str) -> bool:
    """Return whether torchvision's model of that name is one of clips."""
    return model in models.list_models(module=video)


class TorchvisionEncoder(LibraryEncoder):
    """A network of torchvision, without its classifier.

    Args:
        model: Its name.
        image_size: Side in pixels of its input.
        args: Further arguments of its class.
        frames: Frames of a clip; None for a network of images.

    Attributes:
        made_of: The three arguments, from which ``create`` builds torchvision's own network.
    """

    def __init__(self, model: str, image_size: int, args: dict[str, Any], frames: int | None = None) -> None:
        network, head = create(model, image_size, args)
        super().__init__(network, f"torchvision:{model}", image_size, args, (head, *_AUXILIARY), frames)
        self.made_of = (model, image_size, args)
        self.weight_names = (DEFAULT, *(item.name for item in models.get_model_weights(model)))

    @override
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        pooled, features = self._pooled_and_features(x)
        if features.ndim == 3:  # of VisionTransformer: a class token before the patches
            return Encoded(pooled, features, grid_of(features.shape[1] - 1, x))
        return encode_map(pooled, features)

    def _pooled_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        part, reads_input = _before_pooling(self.network)
        seen: list[Tensor] = []
        with part.register_forward_hook(
            lambda _, inputs, output: seen.append(inputs[0] if reads_input else output)
        ):
            pooled = self.network(x)
        [features] = seen
        return pooled, features

    @override
    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Download torchvision's default weights of the model, or those of a name (``IMAGENET1K_V2``)."""
        chosen = _published(self.made_of[0], name)
        tensors: Mapping[str, Tensor] = download(
            self.name, lambda: chosen.get_state_dict(check_hash=True, weights_only=True)
        )
        return tensors


class TorchvisionClipEncoder(TorchvisionEncoder):
    """A network of ``torchvision.models.video``, without its classifier: (b, t, 3, h, w) to (b, d).

    For arguments see TorchvisionEncoder.
    """

    takes_clips = True

    @override
    def encode(self, x: Float[Tensor, "b *t 3 h w"]) -> Encoded:
        pooled, features = self._pooled_and_features(as_clips(x).transpose(1, 2))
        if isinstance(features, tuple):  # of MViT: tokens, class token first, and their number in t, h and w
            return Encoded(pooled, features[0], None)
        return encode_volume(pooled, features)

    @override
    def forward(self, x: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b d"]:
        features: Tensor = self.network(as_clips(x).transpose(1, 2))
        return features


def create(model: str, image_size: int, args: dict[str, Any]) -> tuple[nn.Module, str]:
    """Build torchvision's own network without its classifier; return the classifier's name too.

    Raises:
        UserError: no such model, or arguments that it does not have or accept.
    """
    name, outline = f"torchvision:{model}", _outline(model)
    parameters = inspect.signature(type(outline)).parameters
    check_arguments(name, args, [each for each in parameters if each not in _RESERVED])
    with explain_refusal(name, args, image_size):
        network = models.get_model(model, weights=None, **arguments(model, image_size, args))
    kinds = (nn.Linear, nn.Conv3d)  # S3D ends in a convolution
    head = [name for name, part in network.named_modules() if isinstance(part, kinds)][-1:]
    if not head:
        raise UserError(
            f"{name}: ends in no linear layer, so its features are not known; choose another model"
        )
    network.set_submodule(head[0], nn.Identity())
    return network, head[0]


def arguments(model: str, image_size: int, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``torchvision.models.get_model`` besides the name."""
    parameters = inspect.signature(type(_outline(model))).parameters
    fixed = {"image_size": image_size, **_FIXED}
    return {name: value for name, value in fixed.items() if name in parameters} | args


def input_spec(model: str, weights: str) -> InputSpec:
    """Describe the input that a model's weights were trained on; for unknown weights, its default ones."""
    _outline(model)
    preset = (_published(model, weights) or models.get_model_weights(model).DEFAULT).transforms()
    frames = _CLIP if takes_clips(model) else 1
    return InputSpec(preset.crop_size[0], preset.resize_size[0], list(preset.mean), list(preset.std), frames)


def _published(model: str, name: str) -> Any:
    named = models.get_model_weights(model)
    return named.DEFAULT if name == DEFAULT else named.__members__.get(name)


@cache
def _outline(model: str) -> nn.Module:
    """Build a network without memory and random numbers, to read its arguments."""
    check_model("torchvision", model, [*models.list_models(module=models), *models.list_models(module=video)])
    options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    build: Callable[[], nn.Module] = partial(models.get_model, model, weights=None, **options)
    return without_memory(build)


def _before_pooling(network: nn.Module) -> tuple[nn.Module, bool]:
    """Find the module with the last feature map: as input of the pooling, or as output of the last stage."""
    for name in ("avgpool", "encoder", "features", "layers", "conv5", "blocks"):
        if isinstance(part := getattr(network, name, None), nn.Module):
            return (part[-1] if isinstance(part, nn.ModuleList) else part), name == "avgpool"
    raise AssertionError(f"{type(network).__name__}: no feature map known")

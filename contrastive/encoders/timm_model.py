"""``timm:MODEL``: any image network of timm (pip package ``timm``)."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from contrastive.encoders.encoder import Encoded, encode_map, grid_of
from contrastive.encoders.library import (
    DEFAULT,
    LibraryEncoder,
    check_arguments,
    check_model,
    download,
    explain_refusal,
)
from contrastive.encoders.spec import InputSpec

_RESERVED = (
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),  # files and URLs
    *("pretrained", "num_classes", "features_only", "in_chans"),  # set by the encoder itself
    *("cfg", "block_args", "kwargs", "device", "dtype"),  # not expressible in a config
)
"""Arguments that ``encoder.args`` must not set: they may come from a file that is not trusted."""


def build(model: str, image_size: int, /, **args: Any) -> LibraryEncoder:
    """Build ``timm:MODEL`` with random weights.

    Args:
        model: A name of ``timm.list_models()``, with or without a tag (``resnet18.a1_in1k``).
        image_size: Side in pixels; ``img_size`` of the networks that have it.
        args: Further arguments of the network's class, e.g. ``patch_size``.
    """
    return TimmEncoder(model, image_size, args)


class TimmEncoder(LibraryEncoder):
    """A network of timm, without its classifier.

    Args:
        model: Its name.
        image_size: Side in pixels of its input.
        args: Further arguments of its class.

    Attributes:
        made_of: The three arguments, from which ``create`` builds timm's own network.
    """

    weight_names = (DEFAULT,)

    def __init__(self, model: str, image_size: int, args: dict[str, Any]) -> None:
        network = create(model, image_size, args)
        names = network.pretrained_cfg["classifier"]
        names = (names,) if isinstance(names, str) else names
        super().__init__(network, f"timm:{model}", image_size, args, names)
        self.made_of = (model, image_size, args)

    @override
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        network: Any = self.network
        features = network.forward_features(x)
        pooled = network.forward_head(features)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):  # of several branches
            return Encoded(pooled, pooled[:, None], None)
        if features.ndim == 4:
            channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
            return encode_map(pooled, features.permute(0, 3, 1, 2) if channels_last else features)
        prefix = getattr(network, "num_prefix_tokens", 0)
        registers = getattr(network, "num_reg_tokens", 0)
        patches = features[:, prefix:]
        tokens = torch.cat([features[:, : min(1, prefix - registers)], patches], 1)
        return Encoded(pooled, tokens, grid_of(patches.shape[1], x))

    @override
    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Download timm's weights of the model, fitted to the image size as timm does it."""
        options = {"num_classes": 0, "pretrained": True, **arguments(*self.made_of)}
        network: nn.Module = download(self.name, lambda: timm.create_model(self.made_of[0], **options))
        return network.state_dict()


def create(model: str, image_size: int, args: dict[str, Any]) -> Any:
    """Build timm's own network, without its classifier.

    Args:
        model: Its name.
        image_size: Side in pixels.
        args: Further arguments of its class.

    Raises:
        UserError: no such model, or arguments that it does not have or accept.
    """
    name, parameters = f"timm:{model}", inspect.signature(type(_outline(model))).parameters
    allowed = [each for each in parameters if each not in _RESERVED]
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    check_arguments(name, args, [*allowed, *(each for each in args if open_ended and each not in _RESERVED)])
    with explain_refusal(name, args, image_size):
        return timm.create_model(model, num_classes=0, **arguments(model, image_size, args))


def arguments(model: str, image_size: int, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` besides the name."""
    sized = "img_size" in inspect.signature(type(_outline(model))).parameters
    return ({"img_size": image_size} if sized else {}) | args


def input_spec(model: str, weights: str) -> InputSpec:
    """Describe the images that timm's weights of a model were trained on."""
    config = _outline(model).pretrained_cfg
    side = config["input_size"][-1]
    return InputSpec(side, int(side / config["crop_pct"]), list(config["mean"]), list(config["std"]))


@cache
def _outline(model: str) -> Any:
    """Build a network without memory and random numbers, to read timm's metadata of it."""
    if not timm.is_model(model):
        check_model("timm", model, timm.list_models())
    with torch.device("meta"):
        return timm.create_model(model, num_classes=0)

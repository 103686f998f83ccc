"""Build an encoder from a config or an ArchSpec, by the registry."""

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from contrastive.config import EncoderConfig, UserError, first_line
from contrastive.encoders.encoder import Encoded, Encoder
from contrastive.encoders.spec import ArchSpec
from contrastive.encoders.temporal import TemporalEncoder
from contrastive.find_part import argument_names, build_part, find_part
from contrastive.registry import ENCODERS, TEMPORAL_HEADS, encoder_key

logger = logging.getLogger(__name__)

Built = TypeVar("Built", bound=nn.Module)

_SETTINGS = ("width", "stem")
"""Settings of ``EncoderConfig`` that are passed to networks with an argument of that name."""


def build_encoder(config: EncoderConfig, image_size: int, frames: int = 1) -> Encoder:
    """Build the encoder of ``config`` with fresh weights, drawn from torch's global generator.

    ``config.weights`` is not read here: see ``contrastive.encoders.weights.load_weights``.

    Args:
        config: Its ``name``, ``args``, ``width`` and ``stem`` are used, for clips ``temporal`` and
            ``temporal_args`` too.
        image_size: Side of the images in pixels.
        frames: Frames of a clip; 1 for images.

    Raises:
        UserError: arguments that the network does not have or does not accept; a temporal head for images.
    """
    allowed, defaults = argument_names(_builder(config.name)), EncoderConfig()
    for name in _SETTINGS:  # only a warning, so that another network can be tried with a recipe
        value = getattr(config, name)
        if name not in allowed and value != getattr(defaults, name):
            logger.warning(
                "encoder.%s=%s (given, or the recipe's) is not used: encoder.name=%s has no such "
                "setting, its arguments are set by encoder.args",
                *(name, value, config.name),
            )
    encoder = build_arch(arch_of(config), image_size, frames)
    if frames > 1 and not encoder.takes_clips:
        return under_head(encoder, config.temporal, config.temporal_args)
    if config.temporal != defaults.temporal or config.temporal_args:
        if frames == 1:
            raise UserError(
                f"encoder.temporal={config.temporal} joins the frames of clips, and data.frames=1 trains on "
                "images; leave it and encoder.temporal_args out, or train on clips (data.name=clips "
                "data.frames=8)"
            )
        logger.warning(
            "encoder.temporal=%s is not used: encoder.name=%s takes clips itself",
            *(config.temporal, config.name),
        )
    return encoder


def under_head(image: Encoder, temporal: str, args: dict[str, Any]) -> TemporalEncoder:
    """Put an image encoder under the temporal head ``temporal``, its weights drawn from torch's generator.

    Raises:
        UserError: no such head, or arguments that it does not have or accept.
    """
    build = find_part("encoder.temporal", TEMPORAL_HEADS, temporal)
    head = build_part(f"encoder.temporal={temporal}", "encoder.temporal_args", build, image.dim, args=args)
    encoder = TemporalEncoder(image, head)
    if image.arch is not None:
        encoder.arch = replace(image.arch, temporal=temporal, temporal_args=dict(args))
    return encoder


def arch_of(config: EncoderConfig) -> ArchSpec:
    """Describe the network of ``config``: ``encoder.args``, and ``width`` and ``stem`` if it has them."""
    allowed = argument_names(_builder(config.name))
    settings = {name: getattr(config, name) for name in _SETTINGS if name in allowed}
    return ArchSpec(config.name, settings | config.args)


def build_arch(arch: ArchSpec, image_size: int, frames: int = 1) -> Encoder:
    """Build the network that ``arch`` describes, with fresh weights from torch's global generator.

    Args:
        arch: Description with a name of the registry.
        image_size: Side of the images in pixels.
        frames: Frames of a clip; 1 for images.

    Raises:
        UserError: arguments that the network does not have or does not accept.
    """
    build, key = _builder(arch.name), encoder_key(arch.name)
    name = arch.name.removeprefix(key) if key.endswith(":") else key
    encoder: Encoder = build_part(
        *(f"encoder.name={arch.name}", "encoder.args", build, name, image_size),
        args=arch.args,
        offered={"frames": frames},
    )
    encoder.arch = encoder.arch or replace(arch, temporal="", temporal_args={})
    return under_head(encoder, arch.temporal, arch.temporal_args) if arch.temporal else encoder


@torch.no_grad()
def check_encoder(encoder: Encoder, *sizes: int, frames: int = 1) -> None:
    """Encode images, or clips, of zeros of each size once, before anything is written.

    Raises:
        UserError: it takes no images of that size, returns something else than ``Encoded``, or pooled
            features of another size than its ``dim``.
    """
    training, name = encoder.training, type(encoder).__name__
    clip, kind = ((frames,), f"clips of {frames} frames") if frames > 1 else ((), "images")
    encoder.eval()
    for size in sizes:
        try:
            encoded = encoder.encode(torch.zeros(2, *clip, 3, size, size))
        except Exception as error:  # the network's own code
            reason = first_line(error)
            raise UserError(
                f"encoder {name}: cannot encode {kind} of {size} px ({reason}); change data.image_size, "
                "augment.*_size, or the network"
            ) from error
        if not isinstance(encoded, Encoded):
            raise UserError(
                f"encoder {name}: encode returns a {type(encoded).__name__}; return an "
                "Encoded(pooled, tokens, grid), e.g. by encode_map"
            )
        if encoded.pooled.shape != (2, getattr(encoder, "dim", None)):
            raise UserError(
                f"encoder {name}: pooled features of 2 images are {tuple(encoded.pooled.shape)}, its dim is "
                f"{getattr(encoder, 'dim', None)}; set self.dim to the size of a pooled feature"
            )
    encoder.train(training)


def without_memory(build: Callable[[], Built]) -> Built:
    """Build a network on the meta device, which needs neither memory nor random numbers.

    A few networks (RegNet) compute with tensors in their constructor; these are built on the CPU.
    """
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        with torch.random.fork_rng(devices=[]):
            return build()


def _builder(name: str) -> Callable[..., Encoder]:
    """Return the registry's function, which takes the network's name and the image size."""
    module, _, function = ENCODERS[encoder_key(name)].partition(":")
    build: Callable[..., Encoder] = getattr(import_module(module), function)
    return build

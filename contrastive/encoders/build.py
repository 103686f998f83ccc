"""From a config to an encoder."""

from contrastive.config import EncoderConfig
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.resnet import ResNetEncoder

#: Side in pixels up to which ``stem=auto`` keeps full resolution: CIFAR, digits, Tiny ImageNet.
SMALL_IMAGE = 64


def build_encoder(config: EncoderConfig, image_size: int) -> Encoder:
    """The encoder of ``config`` with fresh weights, drawn from torch's global generator.

    ``config.weights`` is not read here: see ``contrastive.encoders.weights.load_weights``.

    Args:
        config: Its ``name``, ``width`` and ``stem`` count.
        image_size: Side in pixels, which decides ``stem=auto``.
    """
    small = resolve_stem(config.stem, image_size) == "small"
    return ResNetEncoder(config.name, width=config.width, small_stem=small)


def resolve_stem(stem: str, image_size: int) -> str:
    """``small`` or ``imagenet``: what ``auto`` means for images of this side."""
    if stem != "auto":
        return stem
    return "small" if image_size <= SMALL_IMAGE else "imagenet"

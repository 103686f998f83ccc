"""Number an encoder's parameters by depth, recompute its activations, freeze its patch projection."""

from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrastive.config import UserError
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.library import LibraryEncoder

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PATCH_PROJECTIONS = ("patch_embed.proj", "conv_proj")
"""Names of the patch projection in transformers of timm and torchvision."""


def depths(encoder: Encoder) -> dict[str, int]:
    """Number the parameters of an encoder by block: 0 before the first block, then 1, 2, ...

    Networks of timm number their own. In others a block is an element of a Sequential or ModuleList that has
    parts itself; what follows a block outside any other, such as a norm, belongs to it. A temporal head is
    one more block.

    Returns:
        Depth by the name in ``encoder.named_parameters()``.
    """
    if (image := encoder.image_encoder) is not encoder:
        inner = {f"image.{name}": depth for name, depth in depths(image).items()}
        head = (name for name, _ in encoder.named_parameters() if name not in inner)
        return inner | dict.fromkeys(head, max(inner.values()) + 1)
    network, prefix = (encoder.network, "network.") if isinstance(encoder, LibraryEncoder) else (encoder, "")
    if callable(matcher := getattr(network, "group_matcher", None)):
        # Only a network of timm has this, so timm is imported already.
        group = import_module("timm.models").group_parameters
        own: dict[str, int] = group(network, matcher(coarse=False), reverse=True)
        return {f"{prefix}{name}": depth for name, depth in own.items()}
    found: dict[str, int] = {}
    _number(network, prefix, False, 0, found)
    return found


def _number(module: nn.Module, prefix: str, is_element: bool, depth: int, found: dict[str, int]) -> int:
    """Number the parameters of ``module`` and return the depth of its last one."""
    is_container = isinstance(module, _CONTAINERS)
    is_block = is_element and not is_container and any(module.children())
    depth += is_block
    found |= {f"{prefix}{name}": depth for name, _ in module.named_parameters(recurse=is_block)}
    for name, child in () if is_block else module.named_children():
        depth = _number(child, f"{prefix}{name}.", is_container, depth, found)
    return depth


def recompute_activations(encoder: Encoder) -> None:
    """Turn on gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): memory for a second forward pass.

    Raises:
        UserError: the network cannot, or has batch norms, whose statistics would move twice a step.
    """
    encoder = encoder.image_encoder
    network: Any = encoder.network if isinstance(encoder, LibraryEncoder) else encoder
    name, remedy = encoder.spec.name, "leave it out, and raise trainer.accumulate_grad_batches to save memory"
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts where a network does not support it
        raise UserError(f"encoder.grad_checkpointing: {name} has none; {remedy}") from error
    if network is not encoder and any(isinstance(part, _BatchNorm) for part in network.modules()):
        raise UserError(
            f"encoder.grad_checkpointing: {name} has batch norms, which would count a batch twice; {remedy}"
        )


def freeze_patch_projection(encoder: Encoder) -> None:
    """Keep the patch projection of a transformer at its weights: MoCo v3, section 4 (arXiv:2104.02057).

    Raises:
        UserError: the network has no patch projection.
    """
    encoder = encoder.image_encoder
    parts = dict(encoder.named_modules())
    prefix = "network." if isinstance(encoder, LibraryEncoder) else ""
    found = [parts[prefix + name] for name in _PATCH_PROJECTIONS if prefix + name in parts]
    if not found:
        raise UserError(
            f"encoder.freeze_patch_projection: {encoder.spec.name} has no patch projection; leave it out, or "
            "choose a vision transformer, e.g. encoder.name=vit_small"
        )
    found[0].requires_grad_(False)

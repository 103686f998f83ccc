"""Record the attention of a network while it encodes, and turn it into maps over the picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from contrastive.config import UserError
from contrastive.encoders.encoder import Encoded, Encoder

ROLLOUT, LAST_LAYER, SIMILARITY = "rollout", "last layer", "similarity"


@dataclass(frozen=True)
class Maps:
    """Maps of a batch over the grid of its positions.

    Attributes:
        maps: By name. ``ROLLOUT`` and ``LAST_LAYER``: attention of the class token as a multiple of what it
            would be if spread evenly, so that the mean over the grid is 1. ``SIMILARITY``: cosine of each
            position with the mean of all, which is what average pooling makes; of networks without a class
            token, or with blocks that do not attend to all tokens.
        heads: The last layer's heads, in the unit of the maps; None with ``SIMILARITY``.
        tokens: The token of each position.
    """

    maps: dict[str, Float[Tensor, "b r c"]]
    heads: Float[Tensor, "b h r c"] | None
    tokens: Float[Tensor, "b r c d"]


def encode_with_attention(encoder: Encoder, x: Float[Tensor, "b 3 h w"]) -> Encoded:
    """Encode images and fill ``Encoded.attention``; slower, and takes memory for the weights of all blocks.

    Any network will do that attends by torch's ``scaled_dot_product_attention`` or ``nn.MultiheadAttention``:
    those of torchvision and timm (unless ``TIMM_FUSED_ATTN=0`` is set), and your own. Its code, parameters
    and outputs are unchanged (outputs of ``nn.MultiheadAttention`` up to rounding).

    Args:
        encoder: In evaluation mode, or the weights include dropout.
        x: Views, on the encoder's device.
    """
    with _Recorder() as recorder:
        encoded = encoder.encode(x)
    blocks = tuple(weights for weights in recorder.weights if weights.shape[-2] > 1)  # 1 query: a pooling
    tokens = blocks[0].shape[-1] if blocks else 0
    shapes = {(len(weights), *weights.shape[2:]) for weights in blocks}
    attend_to_all = shapes == {(len(x), tokens, tokens)} and tokens >= encoded.tokens.shape[1]
    return replace(encoded, attention=blocks if attend_to_all else None)


class _Recorder(TorchFunctionMode):
    """Calls torch's attention functions as the network does, and keeps the softmax weights.

    Hooks would not do: a fused attention is one call inside a module's ``forward``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # nn.MultiheadAttention
            output, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            self.weights.append(weights)
            return output, weights
        if func is F.scaled_dot_product_attention:
            self.weights.append(_weights(*args, **kwargs))
        return func(*args, **kwargs)


def _weights(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the weights of a fused attention: its output for the unit vectors as values."""
    units = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
    return F.scaled_dot_product_attention(
        query, key, units.expand(*key.shape[:-2], *units.shape), *args, **kwargs
    )


def rollout(attention: Sequence[Float[Tensor, "b _ m m"]]) -> Float[Tensor, "b m m"]:
    """Follow attention through all blocks: row i has the shares of the first block's tokens in output i.

    Attention rollout, Abnar & Zuidema 2020 (arXiv:2005.00928), section 3: the product over blocks of
    (A + I) / 2, where A is the mean of the heads and I stands for the residual connection.

    Args:
        attention: Weights of each block, the first one first; heads may differ in number.
    """
    unit = torch.eye(attention[0].shape[-1], dtype=attention[0].dtype, device=attention[0].device)
    joint = unit
    for weights in attention:
        joint = (weights.mean(1) + unit) / 2 @ joint
    return joint


def attention_maps(encoded: Encoded, name: str) -> Maps:
    """Return the maps of a batch that ``encode_with_attention`` encoded.

    Args:
        encoded: The batch.
        name: The network, for messages.

    Raises:
        UserError: the network has no grid of positions, or only one position.
    """
    if encoded.grid is None:
        raise UserError(
            f"{name}: its tokens are no grid of positions, so there is no map to draw; choose another network"
        )
    rows, columns = encoded.grid
    if rows * columns == 1:
        raise UserError(
            f"{name}: its last feature map has a single position at this image size, so there is no map to "
            "draw; evaluate at a larger data.image_size, or choose a network with a finer map"
        )
    patches = encoded.tokens[:, -rows * columns :]
    tokens = patches.reshape(len(patches), rows, columns, -1)
    has_class_token = encoded.tokens.shape[1] > rows * columns
    if encoded.attention is None or not has_class_token:
        cosine = F.cosine_similarity(patches, patches.mean(1, keepdim=True), dim=2)
        return Maps({SIMILARITY: cosine.reshape(-1, rows, columns)}, None, tokens)

    def spread(weights: Tensor) -> Tensor:
        """Cut the patches out of the class token's row; registers are between it and them."""
        over_patches = weights[..., 0, -rows * columns :]
        even = over_patches.mean(-1, keepdim=True)
        return (over_patches / even).reshape(*weights.shape[:-2], rows, columns)

    last = encoded.attention[-1]
    maps = {ROLLOUT: spread(rollout(encoded.attention)), LAST_LAYER: spread(last.mean(1))}
    return Maps(maps, spread(last), tokens)

"""Join the features of a clip's frames: ``mean``, ``attention`` and ``nuta``."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from contrastive.encoders.attention import rollout
from contrastive.encoders.temporal import TemporalHead
from memory_bank.config import check_range

_WIDTH = 1.0  # standard deviation, in frames, of the kernel that puts chosen features on the uniform grid


class Mean(TemporalHead):
    """Average of the frames' features: the same for any order of the frames.

    Args:
        dim_in: Size of a frame's features.
    """

    sees_order: ClassVar[bool] = False

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.dim = dim_in

    @override
    def forward(self, frames: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b t"]]:
        return frames.mean(1), frames.new_full(frames.shape[:2], 1 / frames.shape[1])


class Attention(TemporalHead):
    """Small Transformer over the frames' features and a class token, whose output is the clip's feature.

    Pre-norm blocks as in ViT (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1 to 4), positions of frames as
    in Vaswani et al. 2017 (arXiv:1706.03762, section 3.5). A frame's weight is its share of the class
    token's attention, followed through all blocks (``rollout``).

    Args:
        dim_in: Size of a frame's features.
        dim: Width, a multiple of ``heads``; None takes ``dim_in``.
        layers: Number of blocks.
        heads: Attention heads of a block.
    """

    def __init__(self, dim_in: int, *, dim: int | None = None, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.dim = dim or dim_in
        _check(self.dim, heads)
        check_range("encoder.temporal_args.layers", layers, 1, 64)
        self.enter = _Enter(dim_in, self.dim)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, self.dim))
        self.blocks = nn.ModuleList(_Block(self.dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(self.dim)

    @override
    def forward(self, frames: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t"]]:
        x = torch.cat([self.token.expand(frames.shape[0], -1, -1), self.enter(frames)], 1)
        attention = []
        for block in self.blocks:
            x, weights = block(x)
            attention.append(weights)
        over_frames = rollout(attention)[:, 0, 1:]
        return self.norm(x[:, 0]), over_frames / over_frames.sum(1, keepdim=True)


class Nuta(TemporalHead):
    """Features from moments that attention chooses, aligned with those of all frames and joined with them.

    Non-uniform temporal aggregation (Li et al., WACV 2022, arXiv:2012.08041). From the paper's abstract:
    features are taken from where in time the attention says; a synchronisation step aligns them in time with
    the uniformly taken ones; both are joined. All else is our reading, not a reproduction of the paper's
    network. With frame features x_j that carry their position j:

    - a query for each two neighbouring frames, from their mean; keys and values of all t frames:
      ``M = softmax(q k / sqrt(d))``, rows of which sum to 1, and chosen features ``N_i = sum_j M_ij v_j``.
      The mean of M over i is the weight of each frame, the heat map.
    - N_i was taken at ``t_i = sum_j j M_ij``. The grid's frame j gets ``S_j = sum_i K_ji N_i`` with K_ji in
      proportion to ``exp(-(j - t_i)^2 / 2)`` and ``sum_i K_ji = 1``: an interpolation which any order of
      the t_i leaves smooth.
    - x_j and S_j are concatenated; a convolution over 3 frames, ReLU and the mean over time give the feature.

    Args:
        dim_in: Size of a frame's features.
        dim: Width; None takes ``dim_in``.
    """

    def __init__(self, dim_in: int, *, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim or dim_in
        check_range("encoder.temporal_args.dim", self.dim, 1, 65_536)
        self.enter = _Enter(dim_in, self.dim)
        self.query = nn.Linear(self.dim, self.dim)
        self.key = nn.Linear(self.dim, self.dim, bias=False)  # it would shift all logits of a query alike
        self.value = nn.Linear(self.dim, self.dim)
        self.join = nn.Conv1d(2 * self.dim, self.dim, 3, padding=1)

    @override
    def forward(self, frames: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t"]]:
        x = self.enter(frames)
        pairs = F.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
        weights = _softmax(self.query(pairs), self.key(x))
        chosen = weights @ self.value(x)
        grid = torch.arange(x.shape[1], dtype=weights.dtype, device=x.device)
        taken_at = weights @ grid
        near = torch.softmax(-((grid[:, None] - taken_at[:, None]) ** 2) / (2 * _WIDTH**2), 2)
        joined = self.join(torch.cat([x, near.to(chosen.dtype) @ chosen], 2).transpose(1, 2))
        return F.relu(joined).mean(2), weights.mean(1)


class _Enter(nn.Module):
    """Normalise the frames' features, project them to the head's width, and add their positions."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(dim_in), nn.Linear(dim_in, dim)

    def forward(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        x: Tensor = self.project(self.norm(frames))
        return x + positions(x.shape[1], x.shape[2], x)


class _Block(nn.Module):
    """Block of a Transformer that returns its attention weights too."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "b m e"]) -> tuple[Float[Tensor, "b m e"], Float[Tensor, "b h m m"]]:
        qkv = self.qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = _softmax(query, key)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x)), weights


def positions(t: int, dim: int, like: Tensor) -> Float[Tensor, "t e"]:
    """Return sines and cosines of t positions: Vaswani et al. 2017 (arXiv:1706.03762, section 3.5).

    Differs: all sines come before all cosines; the longest wave has 1,000 frames.

    Args:
        t: Number of positions, from 0.
        dim: Channels; an odd one has a zero at the end.
        like: Tensor of the same dtype and device.
    """
    rates = torch.exp(torch.arange(dim // 2, device=like.device) * (-2 / dim * math.log(1000 / math.tau)))
    angle = torch.arange(t, device=like.device)[:, None] * rates
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim % 2)).to(like.dtype)


def _softmax(query: Float[Tensor, "*b m d"], key: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b m n"]:
    weights: Tensor = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]), -1)
    return weights


def _check(dim: int, heads: int) -> None:
    check_range("encoder.temporal_args.dim", dim, 1, 65_536)
    check_range("encoder.temporal_args.heads", heads, 1, dim)
    if dim % heads:
        raise ValueError(f"encoder.temporal_args.heads={heads}: the width {dim} is no multiple of it")

"""``hybrid_resnet18``: the first stages of a ResNet, then Transformer blocks over their feature map."""

from jaxtyping import Float
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn
from typing_extensions import override

from contrastive.encoders import resnet
from contrastive.encoders.encoder import Encoded, Encoder
from contrastive.encoders.spec import ArchSpec
from memory_bank.config import check_range

_STAGES = 4


class HybridEncoder(Encoder):
    """Feed the mid-level features of a CNN into a Transformer, which relates any position to any other.

    The hybrid of Dosovitskiy et al. 2021 (arXiv:2010.11929, section 3.1). Differs: positions are fixed sines
    and cosines, computed for the map at hand, and tokens are averaged (Beyer et al. 2022, arXiv:2205.01580),
    so that there is neither a class token nor a parameter that depends on the image size.

    Args:
        cnn: Residual network; its stages after ``stages`` are removed.
        stages: Stages to keep, 1 to 4. The tokens are the positions of the last one.
        depth: Number of Transformer blocks.
        heads: Attention heads of a block, a divisor of the last stage's channels; None is one for 64 of them.
        drop_path_rate: Probability of leaving out the last block's branches (stochastic depth); it rises
            linearly from 0 at the first block.
    """

    def __init__(
        self, cnn: resnet.ResNetEncoder, *, stages: int, depth: int, heads: int | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.dim = cnn.dim >> (_STAGES - stages)  # each stage doubles the channels
        heads = heads or max(1, self.dim // 64)
        if self.dim % heads or self.dim % 4:
            raise ValueError(
                f"encoder.args.heads={heads}: the tokens have {self.dim} channels, which must be a multiple "
                "of heads and of 4; set encoder.args.heads or encoder.width"
            )
        for stage in range(stages + 1, _STAGES + 1):
            setattr(cnn, f"layer{stage}", nn.Identity())
        self.cnn = cnn
        rates = [drop_path_rate * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(self.dim, heads, qkv_bias=True, drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.blocks.apply(init_weights_vit_timm)
        self.grad_checkpointing = False

    @override
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        seen = self.cnn.encode(x)
        assert seen.grid is not None
        positions = build_sincos2d_pos_embed(list(seen.grid), self.dim, device=x.device)
        tokens = seen.tokens + positions.to(seen.tokens.dtype)
        tokens = checkpoint_seq(self.blocks, tokens) if self.grad_checkpointing else self.blocks(tokens)
        tokens = self.norm(tokens)
        return Encoded(tokens.mean(1), tokens, seen.grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, as in timm's networks."""
        self.grad_checkpointing = enable


def build(
    name: str,
    image_size: int,
    *,
    width: int = 64,
    stem: str = "auto",
    stages: int = 3,
    depth: int = 4,
    heads: int | None = None,
    drop_path_rate: float = 0.0,
) -> HybridEncoder:
    """Build ``hybrid_RESNET`` with random weights.

    Args:
        name: ``hybrid_`` and the name of a residual network.
        image_size: Side in pixels, which decides ``stem=auto``.
        width: Channels of the residual network's first stage.
        stem: See ``contrastive.encoders.resnet.build``.
        stages: Stages of it to keep: 3 leave 8 x 8 positions of 32 px, 14 x 14 of 224 px.
        depth: Number of Transformer blocks.
        heads: Attention heads of a block; None takes one for 64 channels.
        drop_path_rate: Stochastic depth, see HybridEncoder.

    Raises:
        ValueError: an argument out of its range.
    """
    check_range("encoder.args.stages", stages, 1, _STAGES)
    check_range("encoder.args.depth", depth, 1, 64)
    check_range("encoder.args.heads", heads, 1)
    check_range("encoder.args.drop_path_rate", drop_path_rate, 0, 0.99)
    cnn = resnet.build(name.removeprefix("hybrid_"), image_size, width=width, stem=stem)
    encoder = HybridEncoder(cnn, stages=stages, depth=depth, heads=heads, drop_path_rate=drop_path_rate)
    assert cnn.arch is not None
    blocks = {"stages": stages, "depth": depth, "heads": heads, "drop_path_rate": drop_path_rate}
    encoder.arch = ArchSpec(name, cnn.arch.args | blocks)
    return encoder

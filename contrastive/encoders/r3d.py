"""``r3d_10``: a small residual network of 3-D convolutions, for clips, with torchvision's parameter names."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet
from typing_extensions import override

from contrastive.encoders.encoder import Encoded, Encoder, as_clips, encode_volume
from contrastive.encoders.resnet import choose_stem
from contrastive.encoders.spec import ArchSpec
from memory_bank.config import check_range


class R3dEncoder(Encoder, VideoResNet):  # type: ignore[misc]  # torchvision is untyped
    """R3D, Tran et al. 2018 (arXiv:1711.11248), as in torchvision, with one block a stage, no classifier.

    Args:
        width: Channels of the first stage; later stages double it. 64 is torchvision's.
        small_stem: 3x3x3 stride 1, for frames of about 32 px; otherwise 3x7x7 and stride 2 in space.
    """

    takes_clips = True

    def __init__(self, *, width: int = 64, small_stem: bool = False) -> None:
        nn.Module.__init__(self)  # VideoResNet.__init__ fixes 64 channels and the stem
        self.inplanes = width
        side, stride = (3, 1) if small_stem else (7, 2)
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (3, side, side), (1, stride, stride), (1, side // 2, side // 2), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        stage = partial(VideoResNet._make_layer, self, BasicBlock, Conv3DSimple, blocks=1)
        self.layer1 = stage(width)
        self.layer2 = stage(2 * width, stride=2)
        self.layer3 = stage(4 * width, stride=2)
        self.layer4 = stage(8 * width, stride=2)
        self.dim = 8 * width
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @override
    def encode(self, x: Float[Tensor, "b *t 3 h w"]) -> Encoded:
        features = self.layer1(self.stem(as_clips(x).transpose(1, 2)))
        features = self.layer4(self.layer3(self.layer2(features)))
        return encode_volume(features.mean((2, 3, 4)), features)


def build(name: str, image_size: int, *, frames: int = 1, width: int = 64, stem: str = "auto") -> R3dEncoder:
    """Build the network with fresh weights; it takes clips of any length.

    Args:
        name: ``r3d_10``.
        image_size: Side in pixels, which decides ``stem=auto``.
        frames: Frames of a clip.
        width: Channels of the first stage.
        stem: ``imagenet``, ``small``, or ``auto``: small up to ``SMALL_IMAGE``.
    """
    check_range("encoder.width", width, 1, 65_536)
    stem = choose_stem(stem, image_size)
    encoder = R3dEncoder(width=width, small_stem=stem == "small")
    encoder.arch = ArchSpec(name, {"width": width, "stem": stem})
    return encoder

"""Residual networks with torchvision's parameter names, of any width and with a stem for small images."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from typing_extensions import override

from contrastive.encoders.encoder import Encoded, Encoder, encode_map
from contrastive.encoders.spec import ArchSpec
from memory_bank.config import check_choice, check_range

#: Side in pixels up to which ``stem=auto`` keeps full resolution: CIFAR, digits, Tiny ImageNet.
SMALL_IMAGE = 64

#: Residual block and number of blocks a stage. resnet10 is the smallest of the family (not in torchvision).
ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(Encoder, ResNet):  # type: ignore[misc]  # torchvision is untyped
    """ResNet, He et al. 2015 (arXiv:1512.03385), as in torchvision (v1.5), without the classifier.

    The state dict has torchvision's keys except ``fc.*``, so weights can be exchanged both ways.

    Args:
        name: A key of ``ARCHITECTURES``.
        width: Channels of the first stage; later stages double it. 64 is torchvision's.
        small_stem: 3x3 stride 1 and no max-pool, for images of about 32 px (SimCLR, appendix B.9);
            otherwise 7x7 stride 2 and max-pool.
    """

    def __init__(self, name: str, *, width: int = 64, small_stem: bool = False) -> None:
        # ResNet.__init__ fixes 64 channels and the stem; only its _make_layer and its attribute names are
        # used, so they are set here instead of building a network and discarding half of it.
        nn.Module.__init__(self)
        block, blocks = ARCHITECTURES[name]
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        stage = partial(ResNet._make_layer, self, block)
        self.layer1 = stage(width, blocks[0])
        self.layer2 = stage(2 * width, blocks[1], stride=2)
        self.layer3 = stage(4 * width, blocks[2], stride=2)
        self.layer4 = stage(8 * width, blocks[3], stride=2)
        self.dim = 8 * width * block.expansion
        for module in self.modules():
            # Initialise as torchvision does; batch norm starts at weight 1, bias 0 by default.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.kernel_size == (1, 1) and module.stride == (2, 2) and module.in_channels < 8:
                    _subsample_first(module)

    @override
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        features = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return encode_map(features.mean((2, 3)), features)


def build(name: str, image_size: int, *, width: int = 64, stem: str = "auto") -> ResNetEncoder:
    """Build a residual network with fresh weights.

    Args:
        name: A key of ``ARCHITECTURES``.
        image_size: Side in pixels, which decides ``stem=auto``.
        width: Channels of the first stage; 64 is torchvision's.
        stem: ``imagenet``, ``small``, or ``auto``: small up to ``SMALL_IMAGE``.
    """
    check_range("encoder.width", width, 1, 65_536)
    stem = choose_stem(stem, image_size)
    if name == "resnet50" and width != 64:
        raise ValueError(f"encoder.width={width}: resnet50 comes at width 64 only; use resnet10 to resnet34")
    encoder = ResNetEncoder(name, width=width, small_stem=stem == "small")
    encoder.arch = ArchSpec(name, {"width": width, "stem": stem})
    return encoder


def choose_stem(stem: str, image_size: int) -> str:
    """Return ``imagenet`` or ``small``, as given or as ``auto`` means for images of ``image_size`` pixels.

    Raises:
        ValueError: ``stem`` is none of the three.
    """
    check_choice("encoder.stem", stem, ("auto", "small", "imagenet"))
    if stem != "auto":
        return stem
    return "small" if image_size <= SMALL_IMAGE else "imagenet"


def _subsample_first(convolution: nn.Conv2d) -> None:
    """Replace the stride of a 1x1 convolution by taking every second pixel of its input: equal values.

    On processors with AVX2 and no AVX-512, the weight gradient of torch's strided 1x1 convolution over fewer
    than 8 channels (channels_last, float32) writes out of bounds: oneDNN 3.12, torch 2.14.
    """
    convolution.stride = (1, 1)
    convolution.register_forward_pre_hook(_every_second_pixel)


def _every_second_pixel(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0][..., ::2, ::2]

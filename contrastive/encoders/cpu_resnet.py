"""``cpu_resnet``: a residual network that learns as much as it can from 32 px in an hour of a CPU."""

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from typing_extensions import override

from contrastive.encoders.encoder import Encoded, Encoder, encode_map
from contrastive.encoders.spec import ArchSpec
from memory_bank.config import check_range


class CpuResNet(Encoder):
    """Residual network with few channels where maps are large, and many features at its end.

    The stem halves the side at once, because on a CPU a map of full size costs as much in batch norm and
    memory traffic as in convolutions. A 1x1 convolution widens the last map before it is averaged: features
    for a linear probe at a fraction of the cost of a wide stage. Shortcuts average before they project, as
    ResNet-D's (He et al. 2018, arXiv:1812.01187).

    Args:
        widths: Channels of each stage; each after the first halves the side. Multiples of 16 suit AVX-512.
        blocks: Residual blocks of each stage.
        features: Channels of the last map.
        grid: Side of the grid that the last map is averaged to. Beyond 1 the vector of ``features * grid**2``
            numbers says where things are, which a motion needs.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], features: int, grid: int = 1) -> None:
        super().__init__()
        self.dim, self.grid = features * grid**2, grid
        self.stem = nn.Sequential(*_normalised(nn.Conv2d(3, widths[0], 4, 2, 1, bias=False)))
        self.stages = nn.Sequential(*_blocks(widths, blocks))
        self.widen = nn.Sequential(*_normalised(nn.Conv2d(widths[-1], features, 1, bias=False)))

    @override
    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Encoded:
        features = self.widen(self.stages(self.stem(x)))
        if self.grid == 1:
            return encode_map(features.mean((2, 3)), features)
        return encode_map(F.adaptive_avg_pool2d(features, self.grid).flatten(1), features)


def build(
    name: str,
    image_size: int,
    *,
    widths: object = (64, 128, 256),
    blocks: object = None,
    features: object = 1024,
    grid: object = 1,
) -> CpuResNet:
    """Build the network with random weights, for images of any size of 8 px or more.

    The arguments come from a config, whose types nobody has checked.

    Args:
        name: ``cpu_resnet``.
        image_size: Not used: the network is convolutional.
        widths: See CpuResNet.
        blocks: See CpuResNet; None is one a stage.
        features: See CpuResNet.
        grid: See CpuResNet.

    Raises:
        ValueError: an argument out of its range.
    """
    features = _whole_number("features", features, 65_536)
    grid = _whole_number("grid", grid, 64)
    channels = _whole_numbers("widths", widths)
    counts = [1] * len(channels) if blocks is None else _whole_numbers("blocks", blocks)
    if not channels or len(counts) != len(channels):
        raise ValueError(
            f"encoder.args.blocks={counts}: one number a stage is needed, as of widths={channels}"
        )
    for width, count in zip(channels, counts, strict=True):
        check_range("encoder.args.widths", width, 1, 65_536)
        check_range("encoder.args.blocks", count, 1, 64)
    encoder = CpuResNet(channels, counts, features, grid)
    described: dict[str, object] = {"widths": channels, "blocks": counts, "features": features}
    encoder.arch = ArchSpec(name, described if grid == 1 else described | {"grid": grid})
    return encoder


def _whole_number(name: str, value: object, most: int) -> int:
    if type(value) is not int:  # True is an int too
        raise ValueError(f"encoder.args.{name}={value!r}: a whole number is needed, e.g. 1")
    check_range(f"encoder.args.{name}", value, 1, most)
    return value


def _whole_numbers(name: str, values: object) -> list[int]:
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(
            f"encoder.args.{name}={values!r}: a list of whole numbers is needed, one a stage, e.g. "
            "[64,128,256]"
        )
    return [*values]


def _blocks(widths: Sequence[int], blocks: Sequence[int]) -> Iterator[nn.Module]:
    wide = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for stride in [1 if stage == 0 else 2] + [1] * (count - 1):
            project = nn.Conv2d(wide, width, 1, bias=False)
            shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), project, nn.BatchNorm2d(width))
            yield BasicBlock(wide, width, stride, shortcut if stride == 2 else None)
            wide = width


def _normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)]

"""The views of a batch: from stored uint8 images to what the network sees."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from contrastive.augment.base import Intensity, Params
from contrastive.augment.blur import GaussianBlur
from contrastive.augment.color import ColorJitter, Grayscale, Solarize
from contrastive.augment.corrupt import Erase, GaussianNoise
from contrastive.augment.crop import Crop
from contrastive.augment.noise import uniforms
from contrastive.config import AugmentConfig, DataConfig, ViewConfig

# Values of one piece of a batch on a CPU (256 images of 32 px, 3 MiB): few enough for a cache, many enough
# that starting an operation costs little. With 2 MiB of cache a core, half as many take a sixth longer.
_CACHED_VALUES = 3 * 2**18


class Views:
    """Two random views of each image.

    A view is a pure function of (seed, epoch, id, view): no global random state is read or changed, and an
    image's views do not depend on the batch it is in. An op that is switched off still owns its random
    numbers, so switching it on changes nothing else.

    Args:
        augment: Strengths of the two views.
        data: Gives ``image_size``, ``mean`` and ``std``.
        seed: In [0, 2**32).
        compile: Backend of ``torch.compile(fullgraph=True)`` for the whole chain, e.g. ``inductor``; worth it
            on a GPU. None does not compile.
    """

    def __init__(
        self, augment: AugmentConfig, data: DataConfig, seed: int, *, compile: str | None = None
    ) -> None:
        self.seed = seed
        self.data = data
        self.chains = (Chain(augment.view_1, data), Chain(augment.view_2, data))
        self._compiled = compile is not None
        self._views = torch.compile(self._all, fullgraph=True, backend=compile) if compile else self._all

    def __call__(
        self, images: UInt8[Tensor, "b 3 S S"], ids: Int[Tensor, " b"], epoch: int
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"]]:
        """The views of ``images``.

        Args:
            images: Stored images, at least 1 of them.
            ids: Their data set rows, int64, on the device of ``images``.
            epoch: From 0.

        Returns:
            Two float32 batches of ``data.image_size`` squares, normalised, channels last.
        """
        # A number would be compiled in, and the whole chain compiled again for the next epoch.
        when = torch.full((), epoch, device=ids.device) if self._compiled else epoch
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._views(images, ids, when)

    def _all(self, images: Tensor, ids: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor]:
        view = torch.arange(2, device=ids.device).repeat_interleave(len(ids))
        numbers = uniforms(self.seed, epoch, ids.repeat(2), view, self.chains[0].num_uniforms)
        first, second = (
            chain(images, part) for chain, part in zip(self.chains, numbers.chunk(2), strict=True)
        )
        return first, second


class Chain:
    """One view: crop, jitter, grey, blur, solarize, noise, erase, normalise.

    Args:
        view: Strengths.
        data: Gives ``image_size``, ``mean`` and ``std``.
    """

    def __init__(self, view: ViewConfig, data: DataConfig) -> None:
        self.data = data
        self.crop = Crop(
            data.image_size,
            scale=(view.crop_scale[0], view.crop_scale[1]),
            ratio=(view.crop_ratio[0], view.crop_ratio[1]),
            flip=view.flip,
            rotate=view.rotate,
            translate=view.translate,
            shear=view.shear,
        )
        fill = (data.mean[0], data.mean[1], data.mean[2])
        self.ops: tuple[Intensity, ...] = (
            ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
            Grayscale(p=view.grayscale),
            GaussianBlur((view.blur_sigma[0], view.blur_sigma[1]), p=view.blur),
            Solarize(p=view.solarize),
            GaussianNoise(view.noise_std, p=view.noise),
            Erase((view.erase_scale[0], view.erase_scale[1]), fill, p=view.erase),
        )
        counts = [self.crop.num_uniforms, *(op.num_uniforms for op in self.ops)]
        self._slots = tuple(itertools.pairwise([0, *itertools.accumulate(counts)]))
        self.num_uniforms = sum(counts)

    def __call__(
        self, images: UInt8[Tensor, "b 3 S S"], numbers: Float[Tensor, "b u"]
    ) -> Float[Tensor, "b 3 s s"]:
        """The view of each image that ``numbers``, uniform in [0, 1), describe."""
        params = self.draw(numbers, images.shape[-2], images.shape[-1])
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._piece(images, params).contiguous(memory_format=torch.channels_last)
        size = self.data.image_size
        views = torch.empty((len(images), 3, size, size), memory_format=torch.channels_last)
        pieces = max(1, _CACHED_VALUES // (3 * size * size))
        for start in range(0, len(images), pieces):
            rows = slice(start, start + pieces)
            part = [{name: value[rows] for name, value in drawn.items()} for drawn in params]
            views[rows] = self._piece(images[rows], part)
        return views

    def draw(self, numbers: Float[Tensor, "b u"], height: int, width: int) -> list[Params]:
        """Parameters of the crop and of each op, for images of ``height`` x ``width`` pixels."""
        crop, *rest = (numbers[:, start:end] for start, end in self._slots)
        ops = [op.draw(slot) for op, slot in zip(self.ops, rest, strict=True)]
        return [self.crop.draw(crop, height, width), *ops]

    def _piece(self, images: Tensor, params: list[Params]) -> Tensor:
        # Past Kornia's own call, which copies the images and looks at the parameters once for each op.
        view = self.crop.apply_transform(images.to(torch.float32).div_(255), params[0], {})
        for op, drawn in zip(self.ops, params[1:], strict=True):
            if op.p > 0:
                view = op.overwrite(view, drawn)
        return _normalize_(view, self.data)


def center_view(images: UInt8[Tensor, "b 3 S S"], data: DataConfig) -> Float[Tensor, "b 3 s s"]:
    """The one view of an image that evaluation sees, without randomness.

    An image stored at ``data.image_size`` is taken whole. Of one stored larger than that, views of more than
    64 px take the central 7/8 (ImageNet's "resize to 256, centre crop 224" at any size; a default
    ``data.decode_size`` leaves exactly the pixels of the crop), smaller ones all of it; it is then resized,
    antialiased, where that is still not ``data.image_size``.

    Returns:
        float32, normalised, channels last.
    """
    stored, size = images.shape[-1], data.image_size
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        if stored > size > 64:
            side = max(size, stored * 7 // 8)
            start = (stored - side) // 2
            images = images[..., start : start + side, start : start + side]
        view = images.to(torch.float32).div_(255)
        if view.shape[-1] != size:
            view = F.interpolate(
                view, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        return _normalize_(view, data).contiguous(memory_format=torch.channels_last)


def _normalize_(images: Float[Tensor, "b 3 h w"], data: DataConfig) -> Float[Tensor, "b 3 h w"]:
    """In place: ``(images - data.mean) / data.std`` per channel."""
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        images[:, channel].sub_(mean).div_(std)  # plain numbers: a tensor of them would wait for the device
    return images

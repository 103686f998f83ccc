"""Compute the augmented views of a batch, from stored uint8 images to normalised float32."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from contrastive.augment.base import Intensity, Params
from contrastive.augment.blur import GaussianBlur
from contrastive.augment.color import ColorJitter, Grayscale, Solarize
from contrastive.augment.corrupt import Erase, GaussianNoise, Occlude
from contrastive.augment.crop import Crop
from contrastive.augment.noise import uniforms
from contrastive.config import AugmentConfig, DataConfig, ViewConfig

_HALVES_STREAM = 2_000
"""Number of the noise that chooses the halves of ``disjoint``; views have small numbers."""

# Values of one piece of a batch on a CPU (256 images of 32 px, 3 MiB): few enough for the cache, many enough
# to amortise the overhead of an operation. With 2 MiB of cache per core, half as many take a sixth longer.
_CACHED_VALUES = 3 * 2**18


class Views:
    """Random views of each image or clip: two global ones, then the local ones of multi-crop.

    A view is a pure function of (seed, epoch, id, view): no global random state is read or changed, and an
    image's views do not depend on the batch it is in (except for what ``occlude_with=images`` pastes). An op
    that is switched off keeps its random numbers reserved, so switching it on does not change the others.

    The frames of a clip are all changed alike, and a clip of one frame becomes an image. A clip of a row was
    cut for each global view; local views take these in turn. A third clip, for
    ``objective.own_negatives=clips``, becomes a last view, like the first.

    Args:
        augment: Strengths and number of the views.
        data: Its ``image_size``, ``mean`` and ``std`` are used.
        seed: In [0, 2**32).
        compile: Backend of ``torch.compile(fullgraph=True)`` for the whole chain, e.g. ``inductor``; worth it
            on a GPU. None turns compiling off.
        first_half: Give global views the size of the first half of the run.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        data: DataConfig,
        seed: int,
        *,
        compile: str | None = None,
        first_half: bool = False,
    ) -> None:
        self.seed = seed
        self.data = data
        self.sides = augment.cut_sides(data.image_size)
        self.disjoint = augment.disjoint
        first, last = augment.global_sides(data.image_size)
        size = first if first_half else last
        local = Chain(augment.local, data, augment.local_side(data.image_size))
        self.chains = (
            Chain(augment.view_1, data, size),
            Chain(augment.view_2, data, size),
            *[local] * augment.num_local,
        )
        self._compiled = compile is not None
        self._views = torch.compile(self._all, fullgraph=True, backend=compile) if compile else self._all

    def __call__(
        self,
        images: UInt8[Tensor, "b *f 3 S S"] | UInt8[Tensor, "b n"],
        ids: Int[Tensor, " b"],
        epoch: int,
    ) -> tuple[Float[Tensor, "b *t 3 _ _"], ...]:
        """Return the views of ``images``.

        Args:
            images: Stored images (b, 3, S, S), at least 1 of them; of clips the t frames of view 1, then
                those of view 2 (b, f, 3, S, S); with ``data.crop=original`` the crops of all views (b, n), as
                in ``Batch``: they are changed further, but not cut again.
            ids: Their data set rows, int64, on the device of ``images``.
            epoch: From 0.

        Returns:
            Two float32 batches of ``augment.global_size`` squares, then ``augment.num_local`` of
            ``augment.local_size``; normalised, channels last.
        """
        # A Python number would be a constant of the graph, which would be recompiled in every epoch.
        when = torch.full((), epoch, device=ids.device) if self._compiled else epoch
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._views(images, ids, when)

    def _all(self, images: Tensor, ids: Tensor, epoch: int | Tensor) -> tuple[Tensor, ...]:
        clips: tuple[Tensor, ...] = (images, images)
        if images.ndim == 5:
            clips = images.chunk(images.shape[1] // self.data.frames, dim=1)
        chains = [*self.chains, *self.chains[:1] * (len(clips) - 2)]
        sources = [clips[number % 2] for number in range(len(self.chains))] + [*clips[2:]]
        if cropped := images.ndim == 2:
            crops = images.split_with_sizes([3 * side**2 for side in self.sides], dim=1)
            sources = [
                crop.view(-1, side, side, 3).permute(0, 3, 1, 2)
                for crop, side in zip(crops, self.sides, strict=True)
            ]
        count = len(chains)
        numbers = self.numbers(ids, epoch, count, self.chains[0].num_uniforms)
        halves = self.halves(ids, epoch) + [None] * (count - len(self.chains))
        return tuple(
            chain(source, part, half, cropped)
            for chain, source, part, half in zip(chains, sources, numbers, halves, strict=True)
        )

    def numbers(
        self, ids: Int[Tensor, " b"], epoch: int | Tensor, views: int, count: int
    ) -> tuple[Float[Tensor, "b u"], ...]:
        """Draw the first ``count`` uniforms of each of ``views`` views; the first of them are the crop's."""
        view = torch.arange(views, device=ids.device).repeat_interleave(len(ids))
        return uniforms(self.seed, epoch, ids.repeat(views), view, count).chunk(views)

    def halves(self, ids: Int[Tensor, " b"], epoch: int | Tensor) -> list[Tensor | None]:
        """Return the half that each view is cut from, for each image: opposite ones for global views."""
        if not self.disjoint:
            return [None] * len(self.chains)
        draw = (4 * uniforms(self.seed, epoch, ids, _HALVES_STREAM, 1)[:, 0]).long()
        return [draw, draw ^ 1, *[None] * (len(self.chains) - 2)]


class Chain:
    """One view: crop, jitter, grey, blur, solarize, noise, erase, occlude, normalise.

    Args:
        view: Strengths.
        data: Its ``image_size``, ``mean`` and ``std`` are used.
        size: Side of the view in pixels; None is ``data.image_size``.
    """

    def __init__(self, view: ViewConfig, data: DataConfig, size: int | None = None) -> None:
        self.data, self.size = data, size or data.image_size
        self.crop = Crop(
            self.size,
            scale=(view.crop_scale[0], view.crop_scale[1]),
            ratio=(view.crop_ratio[0], view.crop_ratio[1]),
            flip=view.flip,
            rotate=view.rotate,
            translate=view.translate,
            shear=view.shear,
        )
        fill = (data.mean[0], data.mean[1], data.mean[2])
        low, high = view.occlude_scale
        self.occlude = Occlude((low, high), pastes=view.occlude_with == "images", p=view.occlude)
        self.ops: tuple[Intensity, ...] = (
            ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
            Grayscale(p=view.grayscale),
            GaussianBlur((view.blur_sigma[0], view.blur_sigma[1]), p=view.blur),
            Solarize(p=view.solarize),
            GaussianNoise(view.noise_std, p=view.noise),
            Erase((view.erase_scale[0], view.erase_scale[1]), fill, p=view.erase),
            self.occlude,  # the last, so that the random numbers of the others are those of earlier releases
        )
        counts = [self.crop.num_uniforms, *(op.num_uniforms for op in self.ops)]
        self._slots = tuple(itertools.pairwise([0, *itertools.accumulate(counts)]))
        self.num_uniforms = sum(counts)

    def __call__(
        self,
        images: UInt8[Tensor, "b *f 3 S S"],
        numbers: Float[Tensor, "b u"],
        half: Int[Tensor, " b"] | None = None,
        cropped: bool = False,
    ) -> Float[Tensor, "b *t 3 s s"]:
        """Return the view of each image or clip that ``numbers``, uniform in [0, 1), describe.

        Args:
            images: Stored images, or clips.
            numbers: ``num_uniforms`` for each image or clip.
            half: See ``Crop.draw``.
            cropped: Whether ``images`` are crops already, of the same ``numbers``.
        """
        params = self.draw(numbers, images.shape[-2], images.shape[-1], half)
        if cropped:
            del params[0]["box"]
        if self.occlude.pastes and self.occlude.p > 0:
            params[-1] |= self.occlude.pasted(images, params[-1]["other"])
        if images.ndim == 4:
            return self._apply(images, params)
        frames = images.shape[1]
        alike = [{name: _for_frames(value, frames) for name, value in drawn.items()} for drawn in params]
        return _as_clips(self._apply(images.flatten(0, 1), alike), frames)

    def _apply(self, images: Tensor, params: list[Params]) -> Tensor:
        """Apply the operations with the parameters of each image."""
        if "paint" in params[-1]:
            params[-1]["paint"] = _resized(params[-1]["paint"], self.size)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._piece(images, params).contiguous(memory_format=torch.channels_last)
        size = self.size
        views = torch.empty((len(images), 3, size, size), memory_format=torch.channels_last)
        pieces = max(1, _CACHED_VALUES // (3 * size * size))
        for start in range(0, len(images), pieces):
            rows = slice(start, start + pieces)
            part = [{name: value[rows] for name, value in drawn.items()} for drawn in params]
            views[rows] = self._piece(images[rows], part)
        return views

    def draw(
        self, numbers: Float[Tensor, "b u"], height: int, width: int, half: Int[Tensor, " b"] | None = None
    ) -> list[Params]:
        """Return parameters of the crop and of each op, for images of ``height`` x ``width`` pixels."""
        crop, *rest = (numbers[:, start:end] for start, end in self._slots)
        ops = [op.draw(slot) for op, slot in zip(self.ops, rest, strict=True)]
        return [self.crop.draw(crop, height, width, half), *ops]

    def _piece(self, images: Tensor, params: list[Params]) -> Tensor:
        # Kornia's own __call__ is bypassed: it copies the images and inspects the parameters for each op.
        view = self.crop.apply_transform(images.to(torch.float32).div_(255), params[0], {})
        for op, drawn in zip(self.ops, params[1:], strict=True):
            if op.p > 0:
                view = op.overwrite(view, drawn)
        return _normalize_(view, self.data)


def center_of(stored: int, size: int) -> tuple[int, int]:
    """Return the first pixel of an image, and the one after the last, that its centre view is made of.

    Args:
        stored: Side of the image.
        size: Side of the view.
    """
    side = max(size, stored * 7 // 8) if stored > size > 64 else stored
    start = (stored - side) // 2
    return start, start + side


def center_view(images: UInt8[Tensor, "b *f 3 S S"], data: DataConfig) -> Float[Tensor, "b *f 3 s s"]:
    """Compute the view of an image, or of each frame, for evaluation, without randomness.

    An image stored at ``data.image_size`` is used whole. If it is stored larger, views of more than 64 px are
    its central 7/8 (ImageNet's "resize to 256, centre crop 224" at any size; a default ``data.decode_size``
    leaves exactly the pixels of the crop), smaller views all of it. The result is resized, antialiased, if
    it is still not of ``data.image_size``.

    Returns:
        float32, normalised, channels last.
    """
    if images.ndim == 5:
        return _as_clips(center_view(images.flatten(0, 1), data), images.shape[1])
    stored, size = images.shape[-1], data.image_size
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        start, end = center_of(stored, size)
        view = _resized(images[..., start:end, start:end], size)
        return _normalize_(view, data).contiguous(memory_format=torch.channels_last)


def encode_center(
    module: nn.Module, images: UInt8[Tensor, "b *f 3 S S"], data: DataConfig
) -> Float[Tensor, "b ..."]:
    """Compute what ``module`` gives for the centre view, for videos the mean over their clips.

    Args:
        module: Network from views (b, 3, s, s), or (b, t, 3, s, s), to features.
        images: Stored images, or the frames of a video's clips, one clip of ``data.frames`` after the other.
        data: How views are cut and normalised.
    """
    views = center_view(images, data)
    if views.ndim == 4:
        output: Tensor = module(views)
        return output
    num_clips = views.shape[1] // data.frames
    output = module(_as_clips(views.flatten(0, 1), data.frames))
    return output.reshape(-1, num_clips, *output.shape[1:]).mean(1)


def _as_clips(frames: Float[Tensor, "_ 3 s s"], length: int) -> Float[Tensor, "b *t 3 s s"]:
    """Split frames into clips, without a copy; of one frame, these are images."""
    return frames.view(-1, length, *frames.shape[1:]) if length > 1 else frames


def _for_frames(value: Tensor, frames: int) -> Tensor:
    """Return for each frame of each clip what was drawn for the clip; clips themselves give their frames."""
    return value.flatten(0, 1) if value.ndim == 5 else value.repeat_interleave(frames, 0)


def _resized(images: UInt8[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """Return the whole images in [0, 1], resized with antialiasing if they are not squares of ``size``."""
    view = images.to(torch.float32).div_(255)
    if view.shape[-1] == size:
        return view
    return F.interpolate(view, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _normalize_(images: Float[Tensor, "b 3 h w"], data: DataConfig) -> Float[Tensor, "b 3 h w"]:
    """Normalise in place: ``(images - data.mean) / data.std`` per channel."""
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        images[:, channel].sub_(mean).div_(std)  # plain numbers: a tensor of them would wait for the device
    return images

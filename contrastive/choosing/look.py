"""Look at images, in a folder or in shards: how many, how large, of what kind; from a sample, in seconds."""

import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from contrastive.config import WHITE, DataConfig, UserError
from contrastive.data.dataset import Dataset, open_dataset
from contrastive.data.decode import (
    DARK,
    Unreadable,
    deep_values,
    explain_unreadable,
    has_alpha,
    ignore_warnings,
    to_rgb,
    to_square,
)
from contrastive.data.encoded import EncodedImages, FileImages
from contrastive.data.files import IMAGE, Layout, find_layout, holds, shorten
from contrastive.data.images import Images
from contrastive.data.reading import usable_cpus
from contrastive.data.shards.index import SET_FILE
from contrastive.data.shards.ranges import is_local
from contrastive.data.video import VIDEO
from contrastive.data.wrapped import stored_at

SAMPLE = 256
"""Most images to look at; they are spread evenly over the sorted paths."""

PIXELS_OF, BYTES_OF_PIXELS = 16, 64 * 2**20
"""Pixels are decoded of this many images at least, and of more until their files exceed this size."""

SMALLEST_SPLIT = 50
"""Images from which on some may be held out: of fewer, a hash of the path may leave a part empty."""

Pixels = npt.NDArray[np.uint8]

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_SIDE = 64  # of the decoded sample
_COLOURED = 12  # difference between channels, of 255: JPEG makes smaller ones out of grey
_TWO_VALUED = 0.8  # Otsu's criterion: 0.87 for scanned digits (median), 0.93 for a page, 0.73 for photographs


@dataclass(frozen=True)
class Folder:
    """Describe the images, as far as settings depend on them; shares are of the images that were looked at.

    Attributes:
        root: The folder.
        source: ``data.name`` that reads it.
        why: Why that one, for people; empty if the user states it.
        num_images: Training images.
        labelled: Whether they have labels, so that a run can have scores.
        looked_at: Images that were looked at and can be read.
        unreadable: Images that were looked at and cannot be read.
        side: Median of the shorter side, in pixels.
        small_side: The shorter side that nine in ten images have at least, in pixels.
        grey: Share without colour.
        alpha: Share with transparency.
        fourth_band: Share with a channel of transparency that is mostly neither opaque nor transparent, as if
            it were a fourth band of the picture.
        two_valued: Share that is grey and has pixels of mainly two brightnesses, as writing has.
        deep: Share of grey files with more than 8 bits.
        white: The value that is white in these: the least 2^k - 1 that none of them exceeds, but for one in a
            hundred; as the user states it, if at all.
        dark: Share of these that are nearly black beside ``white``, as files of fewer bits are.
        white_of_dark: The value that would be white in the dark ones.
        mean: Mean of each channel, in [0, 1] units.
        std: Standard deviation of each channel, in [0, 1] units.
    """

    root: str
    source: str
    why: str
    num_images: int
    labelled: bool
    looked_at: int
    unreadable: int
    side: int
    small_side: int
    grey: float
    alpha: float
    fourth_band: float
    two_valued: float
    deep: float
    white: int
    dark: float
    white_of_dark: int
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        shares = {
            "grey": self.grey,
            "with two brightnesses": self.two_valued,
            "16-bit": self.deep,
        }
        shares |= {"with transparency, seen on white": self.alpha}
        kinds = [f"{share:.0%} {kind}" for kind, share in shares.items() if share]
        kinds += [f"{self.unreadable} of {self.looked_at + self.unreadable} cannot be read"] * bool(
            self.unreadable
        )
        return ", ".join(
            [
                f"{self.num_images} training images",
                f"shorter side {self.side} px (nine in ten have {self.small_side} or more)",
                *kinds,
            ]
        )


@dataclass(frozen=True)
class _Glance:
    """Describe one image: its header, and, if it was decoded, single pixels and a resized square.

    ``brightest`` is the largest value of a grey image with more than 8 bits; for ``fourth_band`` see Folder.
    """

    side: int
    alpha: bool
    deep: bool
    brightest: int | None = None
    fourth_band: bool = False
    points: Pixels | None = None
    square: Pixels | None = None


def look_at_folder(data: DataConfig, stated: Collection[str]) -> Folder:
    """Look at the images at ``data.root``.

    Labels decide nothing, except that class folders make ``source`` ``imagefolder``.

    Args:
        data: Root and, if they are stated, name of the source and ``white``.
        stated: Names of the settings that are the user's: ``data.name`` and ``data.white`` are kept.

    Raises:
        UserError: no folder, an archive, no image, none that can be read; also what the source refuses.
    """
    root = data.root or "."
    if Path(root).is_file() and Path(root).suffix.lower() in _ARCHIVES:
        raise UserError(f"{root}: is an archive; unpack it, and set data.root to the folder of the images")
    source, why = (data.name, "") if "data.name" in stated else find_source(root)
    dataset = open_dataset(replace(data, name=source))
    images = dataset.train
    if not isinstance(stored_at(images, 0)[0], EncodedImages):
        raise UserError(
            f"data.name={source}: settings are chosen for image files alone, in folders or in shards; use "
            "data.name=images, imagefolder or shards, or the recipe of that data set"
        )
    glances, reasons = _look_at(images)
    white = data.white if "data.white" in stated else _white(_brightest(glances))
    if white != images.white:
        images.white = white
        glances, reasons = _look_at(images)  # again, as training will see them
    if not any(one.points is not None for one in glances):
        raise UserError(
            f"data.root={root}: none of the images that were looked at can be read "
            f"({reasons[0]}); check data.root, the files' rights and format"
        )
    return _summary(root, source, why, dataset, glances, len(reasons))


def find_source(place: str | Path) -> tuple[str, str]:
    """Find out whether a place is read as shards, or as class folders; return ``data.name`` and why.

    Args:
        place: Folder, or a URL, which only shards can have.

    Raises:
        UserError: no such folder, no image, folders that may be parts or classes.
    """
    if not is_local(str(place)):
        return "shards", "behind a URL are shards"
    root = Path(place)
    if any((root / part / SET_FILE).is_file() for part in ("", "train")):
        return "shards", f"{SET_FILE} lists them"
    if not holds(root, IMAGE):
        _explain_what_else(root)
    layout = find_layout(root)
    (train, test), folders, loose = layout.parts, layout.folders, layout.loose
    num_images = layout.in_folders + len(loose)
    if loose:
        both = f"; {train}/ and {test}/ are both trained on" if test else ""
        return "images", f"{_describe_loose(layout)}{both}"
    if len(folders) == 1:
        return "images", f"all images lie in one folder ({next(iter(folders))})"
    if not layout.may_be_classes:
        return "images", f"{len(folders)} folders of typically {layout.typical:.0f} images are hardly classes"
    if test is not None:
        return (
            "imagefolder",
            f"{len(folders)} class folders; {train}/ is trained on, {test}/ is left for scores",
        )
    if num_images < SMALLEST_SPLIT:
        return "images", f"{num_images} images are too few to hold some out for scores"
    return (
        "imagefolder",
        f"{len(folders)} class folders; one image in five is held out for scores (if they are no classes, "
        "state data.name=images)",
    )


def _describe_loose(layout: Layout) -> str:
    """Count the images in no class folder, and say what they cost where the others lie in such folders."""
    count, names = len(layout.loose), shorten(layout.loose, 2)
    if not layout.folders:
        return f"all images lie in no class folder ({names})"
    lie = f"{count} of {count + layout.in_folders} images lie in no class folder ({names})"
    if not layout.may_be_classes:
        return lie
    return (
        f"{lie}, so the {len(layout.folders)} folders of the other {layout.in_folders} are not read as "
        "classes and no image is held out for scores (if they are classes, move the loose images into "
        "them or out of data.root)"
    )


def _explain_what_else(root: Path) -> None:
    """Refuse a folder without images that holds something else that can be trained on."""
    if holds(root, VIDEO):
        raise UserError(
            f"{root}: holds videos, and settings are chosen for images; use --config clips data.root={root}, "
            "whose settings are a start"
        )
    if any(root.glob("*.tar")):
        raise UserError(
            f"{root}: holds tar files without an index; run contrastive-shards index {root}, or unpack them"
        )


def _look_at(images: Images) -> tuple[list[_Glance], list[str]]:
    """Look at a sample; return what was seen, and why each other image cannot be read."""
    rows = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(int).tolist()
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cpus()) as pool:
        ignore_warnings()
        seen = list(pool.map(partial(_glance, images), rows, _decoded(images, rows)))
    return [one for one in seen if isinstance(one, _Glance)], [one for one in seen if isinstance(one, str)]


def _decoded(images: Images, rows: Sequence[int]) -> list[bool]:
    """Decide of which of the ``rows`` the pixels are decoded, by the sizes of the files alone.

    Every k-th, so that these too are spread evenly; all of other sources, which read an image whole for its
    header already.
    """
    if not isinstance(images, FileImages):
        return [True] * len(rows)
    sizes = [int(stamp) if (stamp := images.stamp(row)).isdigit() else 0 for row in rows]
    every = max(1, -(-sum(sizes) // BYTES_OF_PIXELS))
    every = min(every, max(1, len(rows) // PIXELS_OF))
    return [index % every == 0 for index in range(len(rows))]


def _glance(images: Images, row: int, decoded: bool) -> _Glance | str:
    """Look at one image; return the reason if it cannot be read."""
    source, place = stored_at(images, row)
    assert isinstance(source, EncodedImages)
    try:
        with explain_unreadable(), source.open(place) as file, Image.open(file) as image:
            header = _Glance(min(image.size), has_alpha(image), image.mode.startswith("I"))
            if not decoded:
                return header
            image.draft(None, (2 * _SIDE, 2 * _SIDE))
            rgb = to_rgb(image, source.white)
            brightest = int(deep_values(image).max()) if header.deep else None
            fourth_band = header.alpha and is_translucent(image)
    except Unreadable as error:
        return f"{images.key(row)}: {error}"
    # Single pixels show whether there are only two values; means over an area would hide it.
    points = np.asarray(rgb.resize((_SIDE, _SIDE), Image.Resampling.NEAREST))
    square = np.asarray(to_square(rgb, _SIDE))
    return replace(header, brightest=brightest, fourth_band=fourth_band, points=points, square=square)


def _summary(
    root: str, source: str, why: str, dataset: Dataset, glances: Sequence[_Glance], unreadable: int
) -> Folder:
    sides = [one.side for one in glances]
    points = [one.points for one in glances if one.points is not None]
    squares = np.stack([one.square for one in glances if one.square is not None])
    brightest, white = _brightest(glances), dataset.train.white
    dark = [value for value in brightest if 255 * value < DARK * white]
    return Folder(
        root=root,
        source=source,
        why=why,
        num_images=len(dataset.train),
        labelled=dataset.labelled is not None,
        looked_at=len(glances),
        unreadable=unreadable,
        side=int(np.median(sides)),
        small_side=int(np.percentile(sides, 10, method="lower")),
        grey=_share([is_grey(one) for one in points]),
        alpha=_share([one.alpha for one in glances]),
        fourth_band=_share([one.fourth_band for one in glances if one.points is not None]),
        two_valued=_share([is_grey(one) and is_two_valued(one) for one in points]),
        deep=_share([one.deep for one in glances]),
        white=white,
        dark=len(dark) / max(1, len(brightest)),
        white_of_dark=_white(dark),
        mean=[round(value, 3) for value in (squares.mean((0, 1, 2)) / 255).tolist()],
        std=[round(value, 3) for value in (squares.std((0, 1, 2)) / 255).tolist()],
    )


def _brightest(glances: Sequence[_Glance]) -> list[int]:
    return [one.brightest for one in glances if one.brightest is not None]


def _white(brightest: Sequence[int]) -> int:
    """Return the white of images whose largest values these are: see ``Folder.white``."""
    if not brightest:
        return WHITE
    usual = int(np.percentile(brightest, 99, method="higher"))
    return (1 << max(8, usual.bit_length())) - 1


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def is_grey(pixels: Pixels) -> bool:
    """Return whether all but 1% of the pixels (h, w, 3) are without colour."""
    spread = pixels.max(-1).astype(int) - pixels.min(-1)
    return bool((spread > _COLOURED).mean() < 0.01)


def is_translucent(image: Image.Image) -> bool:
    """Return whether most pixels are neither opaque nor transparent: cut-outs are, but for their edges."""
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return bool(((alpha > 0) & (alpha < 255)).mean() > 0.5)


def is_two_valued(pixels: Pixels) -> bool:
    """Return whether the pixels (h, w, 3) have mainly two brightnesses.

    Otsu's criterion (1979, "A threshold selection method from gray-level histograms"): the share of the
    variance that lies between the two classes of the best threshold; 0.64 for a normal distribution, 0.75 for
    a uniform one.
    """
    grey = np.sort(pixels.mean(-1).ravel())
    total = grey.var()
    if total == 0:
        return False
    below = np.arange(1, len(grey)) / len(grey)
    sums = np.cumsum(grey)
    lower = sums[:-1] / np.arange(1, len(grey))
    upper = (sums[-1] - sums[:-1]) / np.arange(len(grey) - 1, 0, -1)
    between = below * (1 - below) * (upper - lower) ** 2
    return bool(between.max() / total > _TWO_VALUED)

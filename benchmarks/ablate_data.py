"""Lay out the images of an ablation's preset: those pretrained on, and those that scores are computed from.

``folder/images`` holds the images to pretrain on. ``folder/test`` holds those that are reported on, and
``folder/validation`` others, from the training part, to choose a temperature by; both have a part ``train``
(to fit a probe on, or the gallery) and a part ``test`` (to score, or the queries), with one folder a class or
identity.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from folders import vary
from PIL import Image


@dataclass(frozen=True)
class Classes:
    """Images of classes, ``train/CLASS`` and ``test/CLASS``.

    Images of a class are ordered by a hash of their names, so the first ones are the same everywhere.

    Attributes:
        pretrained: Images of each class to pretrain on, one number for all or one a class; None: all.
        fitted: Images of each class to fit a probe on; None: those pretrained on.
        validation: Images at the end of each class to choose a temperature by; no probe is fitted on them.
        source: Folder of the images, below that of the command line.
    """

    pretrained: int | tuple[int, ...] | None
    fitted: int | None
    validation: int
    source: ClassVar[str] = ""

    def lay_out(self, source: Path, folder: Path) -> None:
        places = sorted(path for path in (source / "train").iterdir() if path.is_dir())
        numbers = self.pretrained if isinstance(self.pretrained, tuple) else [self.pretrained] * len(places)
        for place, pretrained in zip(places, numbers, strict=True):
            images = sorted(place.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
            fitted = pretrained if self.fitted is None else self.fitted
            self._check(place, len(images), max(pretrained or 0, fitted or 0))
            held = images[len(images) - self.validation :]
            link_images(images[:pretrained], folder / "images/train" / place.name)
            link_images(images[:fitted], folder / "test/train" / place.name)
            link_images(
                [one for one in images[:fitted] if one not in held], folder / "validation/train" / place.name
            )
            link_images(held, folder / "validation/test" / place.name)
        for part in ("images", "test"):
            (folder / part / "test").symlink_to((source / "test").resolve(), target_is_directory=True)

    def _check(self, place: Path, found: int, taken: int) -> None:
        if found < taken + self.validation * (self.pretrained is not None):
            raise SystemExit(
                f"{place}: holds {found} images, the preset takes {taken} to train on and "
                f"{self.validation} others to choose a temperature by; give --data with more"
            )


@dataclass(frozen=True)
class Outfits:
    """Figures in outfits: ``frames/*.png`` without labels, ``identities/{train,test}/ID``.

    Identities come in pairs, 2i and 2i + 1, that differ in one piece. A part takes whole pairs.

    Attributes:
        outfits: Frames to pretrain on, the first by name, each of another outfit; None: all.
        variants: Near-identical variants of each frame beside it, with its outfit as their class (0 to 5).
        validation: Identities to choose a temperature by, the first; the others are reported on.
        source: See Classes.
    """

    outfits: int | None
    variants: int
    validation: int
    source: ClassVar[str] = "outfits"

    def lay_out(self, source: Path, folder: Path) -> None:
        frames = sorted((source / "frames").iterdir())[: self.outfits]
        if self.variants:
            for frame in frames:
                save_variants(frame, self.variants, folder / "images")
        else:
            link_images(frames, folder / "images")
        for part in ("train", "test"):
            for place in sorted((source / "identities" / part).iterdir()):
                name = "validation" if int(place.name) < self.validation else "test"
                link_images(sorted(place.iterdir()), folder / name / part / place.name)


def save_variants(frame: Path, number: int, images: Path) -> None:
    """Save a frame and its variants to ``images/train/NAME``, and link the frame in ``images/test/NAME``.

    The test part is never read: without one, images would be held out of the training part.
    """
    place = images / "train" / frame.stem
    place.mkdir(parents=True)
    image = Image.open(frame).convert("RGB")
    for at, variant in enumerate([image, *itertools.islice(vary(image), number)]):
        variant.save(place / f"{at}.png")
    link_images([frame], images / "test" / frame.stem)


def prepare(data: Classes | Outfits, source: Path, folder: Path) -> None:
    """Lay out the images of ``data`` from ``source`` in ``folder``, unless it holds just that already."""
    wanted: dict[str, Any] = json.loads(json.dumps({"source": str(source.resolve()), **asdict(data)}))
    note = folder / "made_of.json"
    if note.is_file() and json.loads(note.read_text()) == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    data.lay_out(source, folder)
    note.write_text(json.dumps(wanted))


def count_images(folder: Path) -> int:
    """Return how many images a preset pretrains on."""
    train = folder / "images" / "train"
    return sum(1 for path in (train if train.is_dir() else folder / "images").rglob("*") if not path.is_dir())


def link_images(images: Sequence[Path], place: Path) -> None:
    """Fill the new folder ``place`` with links to ``images``."""
    place.mkdir(parents=True)
    for image in images:
        os.symlink(image.resolve(), place / image.name)

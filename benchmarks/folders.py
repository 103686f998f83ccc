"""Make unlike image folders to try ``--config own`` on: of digits, CIFAR-10 (JPEG), outfits, fonts, icons.

    python benchmarks/folders.py --out DIR [--cifar DIR] [--outfits DIR] [--fonts DIR] [--icons DIR]

Folders whose source is not given are left out. Each is ``NAME/train`` beside ``NAME/test`` with one
folder a class, except ``outfits``: unlabelled ``frames``, scored on ``identities``. The glyphs need Debian's
packages such as fonts-lato and fonts-roboto, the icons its tango-, gnome-, mate- and oxygen-icon-theme,
the clips PyAV.
"""

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from contrastive.config import DataConfig
from contrastive.data.digits import open_digits

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CONTEXTS = ("actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status")
HANDS = {"train": ("Tango", "gnome", "mate"), "test": ("oxygen",)}
SPECTRA = {"coarse": (1.0, 4.0), "middle": (3.0, 8.0), "fine": (8.0, 20.0)}
ORIENTATIONS = (0, 45, 90, 135)
WORD_LENGTHS = (3, 4, 5, 3, 3, 3, 4, 5, 3, 5, 4, 8, 2, 3, 7, 9)


def make_digits(out: Path) -> None:
    """scikit-learn's digits, 8 px, grey; its fixed quarter is the test part."""
    dataset = open_digits(DataConfig(name="digits", image_size=8))
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        assert images is not None
        assert images.labels is not None
        for row, label in enumerate(images.labels.tolist()):
            grey = images.read(row)[0].numpy()
            save(Image.fromarray(grey), out / part / str(label) / f"{row:04d}.png")


def make_cifar(cifar: Path, out: Path, size_of: dict[str, int]) -> None:
    """The first ``size_of[class]`` training images of each class, linked, and the whole test part."""
    for name, size in size_of.items():
        for part, files in (("train", sorted_files(cifar / "train" / name)[:size]), ("test", None)):
            for file in sorted_files(cifar / "test" / name) if files is None else files:
                link(file, out / part / name / file.name)


def make_variants(cifar: Path, out: Path, pictures: int = 200) -> None:
    """CIFAR-10 images, each beside near-identical ones: shifted, dimmed, compressed, scaled, blurred."""
    for folder in sorted((cifar / "train").iterdir()):
        for file in sorted_files(folder)[:pictures]:
            image = Image.open(file).convert("RGB")
            for number, variant in enumerate([image, *vary(image)]):
                save(variant, out / "train" / folder.name / f"{file.stem}-{number}.png")
        for file in sorted_files(cifar / "test" / folder.name):
            link(file, out / "test" / folder.name / file.name)


def vary(image: Image.Image) -> Iterator[Image.Image]:
    """Yield five near-identical variants of ``image``."""
    side = image.width
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=40)
    yield image.transform(image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0))
    yield ImageEnhance.Brightness(image).enhance(0.95)
    yield Image.open(packed).convert("RGB")
    yield image.resize((side + 2, side + 2)).crop((1, 1, side + 1, side + 1))
    yield ImageEnhance.Sharpness(image).enhance(0.7)


def make_glyphs(fonts: Path, out: Path, side: int = 32) -> None:
    """Characters as black on white in every font below ``fonts``; every fifth family is scored, unseen."""
    families: dict[str, list[Path]] = {}
    for file in sorted([*fonts.rglob("*.ttf"), *fonts.rglob("*.otf")]):
        families.setdefault(file.stem.split("-")[0], []).append(file)
    for number, (_, files) in enumerate(sorted(families.items())):
        part = "test" if number % 5 == 4 else "train"
        for file in files[:4]:
            font = ImageFont.truetype(str(file), side * 3 // 4)
            no_glyph = bytes(font.getmask("\U0010ffff"))  # of a code that is no character
            for character in CHARACTERS:
                box = font.getbbox(character)
                if box[2] <= box[0] or box[3] <= box[1] or bytes(font.getmask(character)) == no_glyph:
                    continue
                image = Image.new("L", (side, side), 255)
                place = ((side - box[2] - box[0]) // 2, (side - box[3] - box[1]) // 2)
                ImageDraw.Draw(image).text(place, character, fill=0, font=font)
                save(image, out / part / f"U+{ord(character):04X}" / f"{file.stem}.png")


def make_clips(clips: Path, out: Path, every: int = 5) -> None:
    """Every fifth frame of each video, by action."""
    import av

    for part in ("train", "test"):
        for file in sorted((clips / part).rglob("*.mp4")):
            with av.open(str(file)) as video:
                for number, frame in enumerate(video.decode(video=0)):
                    if number % every == 0:
                        save(
                            frame.to_image(), out / part / file.parent.name / f"{file.stem}-{number:02d}.png"
                        )


def make_documents(out: Path, train: int = 250, test: int = 100) -> None:
    """Pages in eight layouts as 16-bit grey PNG, with noise and uneven light, 96 x 128 px."""
    for layout in LAYOUTS:
        for row in range(train + test):
            part = "train" if row < train else "test"
            save(page(layout, random.Random(f"{layout}{row}")), out / part / layout / f"{row:04d}.png")


def make_icons(icons: Path, out: Path, sizes: tuple[int, ...] = (32, 48)) -> None:
    """Desktop icons by context, RGBA; three themes of one style are trained on, a theme of another is scored.

    Themes have many icons under several names, and in two sizes, and share some: near-identical variants.
    """
    for part, themes in HANDS.items():
        for file in sorted(file for theme in themes for file in (icons / theme).rglob("*.png")):
            size, context = file.parts[-3], file.parent.name
            known = context in CONTEXTS and size in {f"{side}x{side}" for side in sizes}
            if known and file.exists():  # some are links to other packages' icons
                theme = file.relative_to(icons).parts[0]
                save(Image.open(file), out / part / context / f"{theme}-{size}-{file.name}")


def make_textures(out: Path, train: int = 250, test: int = 100) -> None:
    """Noise in three bands of frequency and four orientations, in random colours, 64 px.

    The class is a statistic: no pixel tells it. The diagonals are each other's mirror images.
    """
    for band in SPECTRA:
        for angle in ORIENTATIONS:
            for row in range(train + test):
                rng = np.random.default_rng(list(f"{band}{angle}-{row}".encode()))
                part = "train" if row < train else "test"
                save(texture(band, angle, rng), out / part / f"{band}-{angle}" / f"{row:04d}.png")


def texture(band: str, angle: float, rng: np.random.Generator, side: int = 64) -> Image.Image:
    """Draw white noise through a filter of a band and an orientation, from one random colour to another."""
    y, x = np.meshgrid(np.fft.fftfreq(side, 1 / side), np.fft.fftfreq(side, 1 / side), indexing="ij")
    low, high = SPECTRA[band]
    radius, direction = np.hypot(x, y), np.degrees(np.arctan2(y, x))
    off = (direction - angle - rng.normal(0, 8) + 90) % 180 - 90
    passed = ((low <= radius) & (radius <= high)) * np.exp(-0.5 * (off / 25) ** 2)
    values = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * passed).real
    share = 1 / (1 + np.exp(-rng.uniform(0.7, 2) * values / values.std()))[..., None]
    colours = rng.uniform(0, 255, (2, 3))
    pixels = colours[0] + share * (colours[1] - colours[0]) + rng.normal(0, 8, (side, side, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


LAYOUTS = ("letter", "columns", "table", "list", "form", "poem", "chart", "picture")


def page(layout: str, rng: random.Random) -> Image.Image:
    """Draw a page of ``layout``: lines of words, boxes and rules at random places and sizes."""
    width, height = 96, 128
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    left, top, step = rng.randint(5, 14), rng.randint(5, 20), rng.randint(6, 9)
    rows = range(top, height - rng.randint(6, 30), step)
    ink = rng.randint(0, 90)
    for number, y in enumerate(rows):
        if layout == "columns":
            for x in (left, width // 2 + 2):
                write(draw, x, y, x + width // 2 - left - 4, ink, rng)
        elif layout == "table":
            draw.line((left, y, width - left, y), fill=ink)
            for x in range(left, width - left, (width - 2 * left) // 4):
                write(draw, x + 2, y + 1, x + 12, ink, rng)
        elif layout == "list":
            draw.rectangle((left, y + 1, left + 2, y + 3), fill=ink)
            write(draw, left + 6, y, rng.randint(width // 2, width - left), ink, rng)
        elif layout == "form":
            write(draw, left, y, left + 25, ink, rng)
            if number % 2:
                draw.rectangle((left + 30, y - 1, width - left, y + step - 3), outline=ink)
        elif layout == "poem":
            if number % 5 != 4:
                write(draw, left + 12, y, rng.randint(width // 2, width - 24), ink, rng)
        elif layout == "letter" or (layout in ("chart", "picture") and y > height * 0.6):
            end = width - left if number % 6 != 5 else rng.randint(width // 3, width - left)
            write(draw, left, y, end, ink, rng)
    if layout == "chart":
        for x in range(left, width - left - 6, 10):
            draw.rectangle((x, rng.randint(12, 60), x + 6, 68), fill=ink)
    if layout == "picture":
        box = (left, top, width - left, 70)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, outline=ink, fill=rng.randint(100, 220))
    values = np.asarray(image, dtype=np.float32) / 255
    noise = np.random.default_rng(rng.randrange(2**32))
    light = np.linspace(rng.uniform(0.6, 1), rng.uniform(0.6, 1), width)[None]
    values = np.clip(values * light + noise.normal(0, 0.04, values.shape), 0, 1)
    return Image.fromarray((values * 65535).astype(np.uint16))


def write(draw: ImageDraw.ImageDraw, x: int, y: int, end: int, ink: int, rng: random.Random) -> None:
    """Fill a line from ``x`` to ``end`` with words, drawn as short strokes as small print looks."""
    while x < end - 3:
        length = min(rng.choice(WORD_LENGTHS) * 2, end - x)
        for place in range(x, x + length, 2):
            draw.line((place, y + rng.randint(0, 2), place, y + 3), fill=ink)
        x += length + 3


def save(image: Image.Image, file: Path) -> None:
    """Write ``image``, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def link(file: Path, place: Path) -> None:
    """Link ``place`` to ``file``, making its folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file.resolve())


def sorted_files(folder: Path) -> list[Path]:
    """Return the files of ``folder`` by name."""
    return sorted(folder.iterdir())


def main() -> None:
    """Make the folders whose sources are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name in ("cifar", "outfits", "fonts", "icons"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    out = given.out
    make_digits(out / "digits")
    make_documents(out / "documents")
    make_textures(out / "textures")
    if given.cifar:
        names = sorted(folder.name for folder in (given.cifar / "train").iterdir())
        make_cifar(given.cifar, out / "cifar-10000", dict.fromkeys(names, 1000))
        make_cifar(given.cifar, out / "cifar-1000", dict.fromkeys(names, 100))
        falling = {name: round(5000 * 0.01 ** (number / 9)) for number, name in enumerate(names)}
        make_cifar(given.cifar, out / "cifar-falling", falling)
        make_variants(given.cifar, out / "variants")
    if given.outfits:
        (out / "outfits").mkdir(parents=True, exist_ok=True)
        for name in ("frames", "identities"):
            (out / "outfits" / name).symlink_to((given.outfits / name).resolve())
        make_clips(given.outfits / "clips", out / "clips")
    if given.fonts:
        make_glyphs(given.fonts, out / "glyphs")
    if given.icons:
        make_icons(given.icons, out / "icons")


if __name__ == "__main__":
    main()

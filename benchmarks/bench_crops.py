"""Measure decoding and cropping on one core: two views of 224 px of a JPEG file, against torchvision's way.

Arms take turns, and processor times are compared within a repeat, since wall times on a shared machine say
little. The files are noise with the spectrum of photographs (amplitude 1 / f ** 1.2), quality 90. Then what
crops of the original change: scikit-learn's two photographs, cut from the picture and from its stored square.

    python benchmarks/bench_crops.py [--repeats 9]

Arms:
    torchvision     ImageFolder, decoded once; RandomResizedCrop twice; to uint8 tensors
    ours            data.crop=original
    ours, DECODER   the same with another decoder of plain JPEG files, of those that are installed
    square          data.crop=square: one stored square of 256 px; its crops are left to the device
"""

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, context, median, quartiles, take_turns, write
from kornia_rs.io import decode_image_jpeg
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomResizedCrop

from contrastive.augment.boxes import DrawBoxes
from contrastive.config import AugmentConfig, DataConfig
from contrastive.data import crops
from contrastive.data.decode import to_square
from contrastive.data.files import open_tree
from contrastive.data.reading import decode

DATA = DataConfig(image_size=224, crop="original")
FILES = {(500, 375): 32, (2000, 1500): 8}  # by width and height
Decode = Callable[[bytes, str], Any]


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEG files below a class folder, as large and as detailed as photographs of this size."""
    noise = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(photograph(noise, *size)).save(folder / "all" / f"{number}.jpg", quality=90)
    return folder


def photograph(noise: np.random.Generator, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return RGB noise with the spectrum of photographs: light that the channels share, and little colour."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = np.hypot(down, across).clip(1 / max(width, height)) ** -1.2

    def field() -> np.ndarray[Any, np.dtype[np.float64]]:
        waves = amplitude * np.exp(2j * np.pi * noise.random(amplitude.shape))
        values = np.fft.irfft2(waves, s=(height, width))
        return np.asarray(values / values.std())

    light = field()
    return np.stack([128 + 45 * (light + 0.3 * field()) for _ in range(3)], -1).clip(0, 255).astype(np.uint8)


def decoders() -> dict[str, Decode | None]:
    """Return the decoders that are installed; None is PIL, which scales while it decodes."""
    # kornia-rs has two: ours is libjpeg-turbo, the other is written in Rust.
    found: dict[str, Decode | None] = {"PIL": None, "zune": lambda data, mode: decode_image_jpeg(data)}

    def with_torchvision(data: bytes, mode: str) -> Any:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return images.decode_jpeg(raw, images.ImageReadMode.RGB).permute(1, 2, 0).numpy()

    images = importlib.import_module("torchvision.io")
    if hasattr(images, "decode_jpeg"):  # deprecated in 0.29
        found["torchvision.io"] = with_torchvision
    try:
        simplejpeg = importlib.import_module("simplejpeg")
        found["simplejpeg"] = lambda data, mode: simplejpeg.decode_jpeg(data)
    except ImportError:
        pass
    try:
        turbo = importlib.import_module("turbojpeg")
        jpeg = turbo.TurboJPEG()
        found["PyTurboJPEG"] = lambda data, mode: jpeg.decode(data, pixel_format=turbo.TJPF_RGB)
    except (ImportError, RuntimeError):  # it comes without the library itself
        pass
    return found


def arms(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what decodes and crops every file of the folder, by name."""
    boxes = DrawBoxes(AugmentConfig(), DATA, seed=0)
    squares = open_tree(folder, 256)
    cropped = crops.CroppedImages(squares, boxes, boxes.sides)
    rows = range(len(squares))
    crop = Compose([RandomResizedCrop(224, (0.2, 1.0)), PILToTensor()])
    pictures = ImageFolder(str(folder), transform=lambda picture: (crop(picture), crop(picture)))

    def torchvisions() -> Any:
        return [torch.stack(pictures[row][0]) for row in rows]

    def ours(other: Decode | None) -> Any:
        kept = crops.decode_image_jpegturbo
        crops.decode_image_jpegturbo = other or refuse
        try:
            return decode(cropped, rows)
        finally:
            crops.decode_image_jpegturbo = kept

    found = {"torchvision": torchvisions, "ours": lambda: decode(cropped, rows)}
    found |= {f"ours, {name}": lambda other=other: ours(other) for name, other in decoders().items()}
    return found | {"square": lambda: decode(squares, rows)}


def refuse(data: bytes, mode: str) -> Any:
    """Leave the file to PIL."""
    raise ValueError


def throughput(size: tuple[int, int], count: int, repeats: int) -> dict[str, Any]:
    """Time every arm on files of one size; compare the pixels of the decoders."""
    with tempfile.TemporaryDirectory() as folder:
        steps = arms(write_photographs(Path(folder) / "set", size, count))
        pixels = {name: step().images for name, step in steps.items() if name.startswith("ours")}
        spent = take_turns(steps, repeats)
    found: dict[str, Any] = {}
    for name, each in spent.items():
        used = [one.processor for one in each]
        over = [base.processor / one for base, one in zip(spent["torchvision"], used, strict=True)]
        found[name] = {
            "images_per_processor_second": count / median(used),
            "over_torchvision": {"median": median(over), "quartiles": quartiles(over)},
        }
        if name in pixels:
            found[name]["largest_difference"] = int((pixels[name].int() - pixels["ours"].int()).abs().max())
        print(size, name, found[name])
    return found


def content(draws: int = 100) -> dict[str, Any]:
    """Compare views of the picture with views of its stored square: detail by size of crop, and lost sides.

    Detail is the standard deviation of the Laplacian of the grey view.
    """
    noise, shares = np.random.default_rng(0), ((0.08, 0.2), (0.2, 0.5), (0.5, 1.0))
    detail: dict[str, list[float]] = {f"{low:g} to {high:g}": [] for low, high in shares}
    for pixels in load_sample_images().images:
        picture = Image.fromarray(pixels)
        side, (left, top) = min(picture.size), ((length - min(picture.size)) / 2 for length in picture.size)
        square = to_square(picture, 256)
        for (low, high), ratios in zip(shares, detail.values(), strict=True):
            for _ in range(draws):
                length = side * noise.uniform(low, high) ** 0.5
                x, y = noise.uniform(0, side - length, 2)
                box = np.array([x, y, x + length, y + length])
                whole = view(picture, np.add(box, (left, top, left, top)))
                ratios.append(laplacian(view(square, box * 256 / side)) / laplacian(whole))
    return {
        "pictures": "scikit-learn's china.jpg and flower.jpg, 640 x 427; squares of 256 px, views of 224 px",
        "detail_of_square_over_original": {
            share: {"median": median(each), "quartiles": quartiles(each)} for share, each in detail.items()
        },
        "area_outside_the_square": {"500 x 375": 1 - 375 / 500, "640 x 427": 1 - 427 / 640},
    }


def view(picture: Image.Image, box: Any) -> Image.Image:
    """Cut a view of 224 px."""
    return picture.resize((224, 224), Image.Resampling.BILINEAR, box=tuple(box.tolist()))


def laplacian(picture: Image.Image) -> float:
    """Return the standard deviation of the Laplacian of the grey picture."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    inner = grey[1:-1, 1:-1]
    return float((4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).std())


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "crops-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"{w} x {h}": throughput((w, h), count, options.repeats) for (w, h), count in FILES.items()}
    packages = ("torch", "torchvision", "pillow", "kornia_rs")
    result = {"files": found, "content": content(), "repeats": options.repeats}
    write(options.out, context("crops", torch.device("cpu"), packages, seeds=[0], **result))


if __name__ == "__main__":
    main()

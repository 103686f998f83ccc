"""Measure views per second: ours, stock Kornia, torchvision v2 image by image, PIL image by image.

One view of the MoCo v2 recipe (crop, flip, jitter, grey, blur, normalise), from stored uint8 to float32. Arms
take turns, so that a disturbance of the machine affects all of them; compare ratios within one run only. On a
shared CPU compare processor times instead of wall times, with --threads 1.

    python benchmarks/bench_augment.py [--device cuda] [--sizes 32 96 224] [--repeats 9] [--threads N]
"""

import argparse
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from common import RESULTS, Spent, context, median, quartiles, take_turns, walls, write
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from contrastive.augment.noise import uniforms
from contrastive.augment.views import Chain
from contrastive.config import DataConfig, ViewConfig
from contrastive.logging.memory import peak_memory

BATCH = {"cpu": {32: 256, 96: 64, 224: 32}, "cuda": {32: 1024, 96: 512, 224: 256}}
PER_SAMPLE = {32: 64, 96: 32, 224: 8}  # images a repeat of the arms that go image by image
VIEW = ViewConfig()  # its defaults are MoCo v2's

Arm = tuple[Callable[[], object], int]


def ours(images: Tensor, data: DataConfig, compiled: bool) -> Arm:
    chain = Chain(VIEW, data)
    ids = torch.arange(len(images), device=images.device)
    epochs = iter(range(2**31))

    def view(numbers: Tensor) -> Tensor:
        return chain(images, numbers)

    run = torch.compile(view, fullgraph=True) if compiled else view

    def step() -> Tensor:
        with torch.no_grad():
            return run(uniforms(0, next(epochs), ids, 0, chain.num_uniforms))

    return step, len(images)


def stock_kornia(images: Tensor, data: DataConfig) -> Arm:
    jitter = (VIEW.brightness, VIEW.contrast, VIEW.saturation, VIEW.hue)
    taps = 2 * (data.image_size // 20) + 1
    chain = K.AugmentationSequential(
        K.RandomResizedCrop((data.image_size, data.image_size), scale=(0.2, 1.0)),
        K.RandomHorizontalFlip(p=VIEW.flip),
        K.ColorJitter(*jitter, p=VIEW.jitter),
        K.RandomGrayscale(p=VIEW.grayscale),
        K.RandomGaussianBlur((max(3, taps), max(3, taps)), (0.1, 2.0), p=VIEW.blur),
        K.Normalize(torch.tensor(data.mean), torch.tensor(data.std)),
    ).to(images.device)

    def step() -> Tensor:
        with torch.no_grad():
            return chain(images.float() / 255)

    return step, len(images)


def torchvision_v2(images: Tensor, data: DataConfig, pil: bool) -> Arm:
    jitter = v2.ColorJitter(VIEW.brightness, VIEW.contrast, VIEW.saturation, VIEW.hue)
    taps = max(3, 2 * (data.image_size // 20) + 1)
    blur = v2.Lambda(_pil_blur) if pil else v2.GaussianBlur(taps, (0.1, 2.0))
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(data.image_size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(VIEW.flip),
            v2.RandomApply([jitter], VIEW.jitter),
            v2.RandomGrayscale(VIEW.grayscale),
            v2.RandomApply([blur], VIEW.blur),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )
    count = min(len(images), PER_SAMPLE.get(data.image_size, 16))
    samples = [image.cpu() for image in images[:count]]
    if pil:
        samples = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in samples]
    return (lambda: torch.stack([chain(sample) for sample in samples])), count


def _pil_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def arms(size: int, device: torch.device) -> dict[str, Arm]:
    data = DataConfig(image_size=size)
    stored, batch = data.stored_size, BATCH[device.type].get(size, 32)
    images = torch.randint(0, 256, (batch, 3, stored, stored), dtype=torch.uint8, device=device)
    found = {"ours": ours(images, data, compiled=False)}
    if device.type == "cuda" or shutil.which("g++"):  # which inductor needs on a CPU
        found["ours, compiled"] = ours(images, data, compiled=True)
    found["stock Kornia"] = stock_kornia(images, data)
    found["torchvision v2 per image"] = torchvision_v2(images, data, pil=False)
    found["PIL per image"] = torchvision_v2(images, data, pil=True)
    return found


def row(size: int, name: str, spent: list[Spent], count: int, kornia: Spent) -> dict[str, Any]:
    wall, processor = _medians(spent, count)
    low, high = quartiles(walls(spent))
    return {
        "size": size,
        "arm": name,
        "views_per_s": 1 / wall,
        "views_per_s_quartiles": [count / high, count / low],
        "batch": count,
        "batch_ms": 1e3 * wall * count,
        "over_stock_kornia": kornia.wall / wall,
        "processor_ms_a_view": 1e3 * processor,
        "processor_over_stock_kornia": kornia.processor / processor,
    }


def _medians(spent: list[Spent], count: int) -> Spent:
    """Return the seconds for one view."""
    wall, processor = zip(*spent, strict=True)
    return Spent(median(wall) / count, median(processor) / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96, 224])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/augment-DEVICE.json")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: a spread needs 2 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(0)
    # After a large tensor is freed, glibc keeps the memory of later ones, in all arms. In training the first
    # activations do this; without it most of the measured time would be page faults.
    torch.ones(7_500_000)
    rows = []
    print(
        f"{'px':>4} {'arm':26} {'views/s':>9} {'quartiles':>17} {'batch':>6} {'ms':>9}  x Kornia (processor)"
    )
    for size in options.sizes:
        found = arms(size, device)
        steps = {name: step for name, (step, _) in found.items()}
        spent = take_turns(steps, options.repeats, device=device, warmup=2)
        kornia = _medians(spent["stock Kornia"], found["stock Kornia"][1])
        for name, (_, count) in found.items():
            made = row(size, name, spent[name], count, kornia)
            low, high = made["views_per_s_quartiles"]
            ratios = f"{made['over_stock_kornia']:.2f} ({made['processor_over_stock_kornia']:.2f})"
            print(
                f"{size:4} {name:26} {made['views_per_s']:9.1f} {low:8.1f} {high:8.1f} {count:6} "
                f"{made['batch_ms']:9.2f}  {ratios}"
            )
            rows.append(made)
    packages = ("torch", "torchvision", "kornia", "pillow")
    about = context("augment", device, packages, repeats=options.repeats, peak_memory_mib=peak_memory(device))
    write(options.out or RESULTS / f"augment-{options.device}.json", about | {"rows": rows})


if __name__ == "__main__":
    main()

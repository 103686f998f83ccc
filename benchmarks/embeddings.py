"""Compute embeddings of a trained encoder, as many as a benchmark of the bank needs.

The project pretrains a narrow resnet10 for a few minutes; its key network then embeds one augmented view
after another of every image. Rows are cached in .data/ (ignored by git), one view a file, so a larger number
extends a smaller one, and a stopped run continues where it was.

    python benchmarks/embeddings.py --images DIR [--subset 10000] [--epochs 4] [--rows 1000000]

DIR holds images in any folder tree (only its train/, if it has one); they are read at 32 px. Without it
the 1,335 images of the digits data set are used: they are very similar, and far fewer than a bank holds, so
the numbers of such a run say little.
"""

import argparse
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import QUIET, once
from torch import Tensor, nn

from contrastive.augment.noise import uniforms
from contrastive.augment.views import Chain
from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from contrastive.config import PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.dataset import open_dataset
from contrastive.data.files import list_images
from contrastive.data.reading import decode_all
from contrastive.encoders.build import build_encoder
from contrastive.pretrain import pretrain
from contrastive.projector import projector

CACHE = Path(__file__).parent.parent / ".data" / "embeddings"
DIM = 128
BATCH = 512
SEED = 0


@dataclass
class Rows:
    """Embeddings as they are stored in a bank.

    Attributes:
        keys: float16 unit rows (n, d).
        source: Image of each row (n,); rows of one image are siblings.
        images: Number of images; row r shows image r % images.
        origin: Description of the embeddings, for the table.
    """

    keys: Tensor
    source: Tensor
    images: int
    origin: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images; default: digits")
    parser.add_argument("--subset", type=int, help="train on and embed this many of the images; default all")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of pretraining; default 4")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default .data/embeddings")


def gaussian(rows: int) -> Rows:
    """Return random directions without structure: no row is near another, the worst case of every index."""
    generator = torch.Generator().manual_seed(SEED)
    keys = F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).half()
    return Rows(keys, torch.arange(rows), rows, "random Gaussian directions")


class Source:
    """Images, the network trained on them, and the views embedded so far; ``len`` counts images."""

    def __init__(self, options: argparse.Namespace) -> None:
        root = _image_root(options)
        self.folder = options.cache / _name(options, root)
        self.config = _config(options, root, self.folder)
        self.origin = f"{'digits' if root is None else root.resolve().name}, {options.epochs} epochs"
        self._pixels: Tensor | None = None
        self._network: nn.Module | None = None
        self._images = open_dataset(self.config.data).train

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, count: int) -> Rows:
        """Return the first ``count`` embeddings, from the cache or computed now."""
        views = -(-count // len(self))
        keys = torch.cat([self.view(number) for number in range(views)])[:count]
        return Rows(keys, torch.arange(count) % len(self), len(self), self.origin)

    def view(self, number: int) -> Tensor:
        """Return float16 (images, d): view ``number`` of every image, the images in one shuffled order."""
        path = self.folder / f"view-{number:03d}.npy"
        if not path.is_file():
            self._prepare()
            taken = once(lambda: _save(path, self._embed(number)))
            print(f"view {number}: {len(self) / taken.wall:.0f} embeddings a second", flush=True)
        return torch.from_numpy(np.load(path))

    def _prepare(self) -> None:
        if self._network is not None:
            return
        self._network = _trained(self.config)
        decoded = decode_all(self._images)
        if decoded.bad:
            raise SystemExit(
                f"{len(decoded.bad)} images cannot be read, e.g. {next(iter(decoded.bad.values()))}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(SEED))
        self._pixels = decoded.images[order]

    @torch.inference_mode()
    def _embed(self, number: int) -> Tensor:
        assert self._network is not None
        assert self._pixels is not None
        chain = Chain(self.config.augment.view_1, self.config.data)
        parts = []
        for ids in torch.arange(len(self)).split(BATCH):
            chosen = uniforms(SEED, number, ids, 0, chain.num_uniforms)
            parts.append(F.normalize(self._network(chain(self._pixels[ids], chosen)), dim=1).half())
        return torch.cat(parts)


def _image_root(options: argparse.Namespace) -> Path | None:
    if options.images is None:
        print("no --images: embeddings of the digits data set, 1,335 very similar images")
        return None
    if not options.images.is_dir():
        raise SystemExit(f"--images {options.images}: no such folder; give a folder of images")
    train = options.images / "train"
    return train if train.is_dir() else options.images


def _name(options: argparse.Namespace, root: Path | None) -> str:
    place = "digits" if root is None else f"{root.resolve().name}-{_hash(root)}"
    return f"{place}-{options.subset or 'all'}-{options.epochs}"


def _hash(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]


def _config(options: argparse.Namespace, root: Path | None, folder: Path) -> PretrainConfig:
    """Return cifar10.yaml (or the demo's), made small enough for two cores to train in minutes."""
    short = [
        f"run.root={folder}",
        "run.name=run",
        "encoder.name=resnet10",
        "encoder.width=16",
        f"encoder.projector_dim={DIM}",
        "encoder.momentum_end=null",
        f"schedule.epochs={options.epochs}",
        f"schedule.warmup_epochs={min(1.0, options.epochs / 4)}",
        *QUIET,
        "trainer.accelerator=cpu",
    ]
    if root is None:
        return load_config(PretrainConfig, "pretrain", "digits", short)
    if options.subset:
        root = _linked(root, folder / "images", options.subset)
    own = [
        f"data.root={root}",
        "data.name=images",
        "encoder.projector_hidden=512",
        "objective.symmetric=false",
    ]
    return load_config(PretrainConfig, "pretrain", "cifar10", [*short, *own])


def _linked(root: Path, folder: Path, count: int) -> Path:
    """Make a folder of links to ``count`` of the images, evenly spaced in their sorted paths."""
    keys = list_images(root)
    if len(keys) < count:
        raise SystemExit(f"--subset {count}: {root} holds {len(keys)} images")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        key = Path(os.fsdecode(keys[number * len(keys) // count]))
        link = folder / f"{number:07d}{key.suffix}"
        if not link.is_symlink():
            link.symlink_to((root / key).resolve())
    return folder


def _trained(config: PretrainConfig) -> nn.Module:
    """Return encoder and projector of the key network, in evaluation mode; pretrain them if necessary."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    started = time.monotonic()
    code, _ = pretrain(config)
    run = Path(config.run.root) / config.run.name
    checkpoint = latest_valid(run / "checkpoints")
    if code or checkpoint is None:  # stopped early: embeddings of a network half trained would be kept
        raise SystemExit(f"{run}: the training ended early (exit code {code}); the same command continues it")
    print(f"pretrained: {run} ({time.monotonic() - started:.0f} s, 0 if it was cached)", flush=True)
    state = DirectoryCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    sizes = config.encoder
    encoder = build_encoder(sizes, config.data.image_size)
    head = projector(encoder.dim, sizes.projector_hidden, sizes.projector_layers, sizes.projector_dim)
    encoder.load_state_dict(_below("key_encoder.", state))
    head.load_state_dict(_below("key_projector.", state))
    return nn.Sequential(encoder, head).eval().to(memory_format=torch.channels_last)


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _save(path: Path, keys: Tensor) -> None:
    """Write an array atomically."""
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.save(file, keys.numpy())
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = Source(options).rows(options.rows)
    pairs = rows.keys[: min(20_000, rows.images)].float()
    near = "one view an image"
    if len(rows.keys) >= rows.images + len(pairs):
        siblings = rows.keys[rows.images : rows.images + len(pairs)].float()
        near = f"two views of an image: mean similarity {float((pairs * siblings).sum(1).mean()):.3f}"
    far = float((pairs * pairs.roll(1, 0)).sum(1).mean())
    print(f"{len(rows.keys)} rows of {rows.images} images ({rows.origin})")
    print(f"{near}; of two images: {far:.3f}")


if __name__ == "__main__":
    main()

"""Compute features of images with a frozen network, and cache them on disk."""

import logging
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.augment.views import encode_center
from contrastive.config import DataConfig, UserError, first_line, launcher_number
from contrastive.data.images import Images, spread_rows
from contrastive.data.reading import read_in_order, usable_cpus
from memory_bank.replacing import write_file

log = logging.getLogger(__name__)

# Number of images from which decoding processes pay off.
_WORKERS_FROM = 20_000
# Unreadable files that are named.
_NAMED = 3


@dataclass(frozen=True)
class PartFeatures:
    """Features and labels of one part of the data, train or test.

    Attributes:
        features: Features in float32, in the order of ``rows``.
        labels: Class of each row.
        rows: Row number of each image in its source; unreadable images are left out.
    """

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int[Tensor, " m"]) -> "PartFeatures":
        """Return some of the rows."""
        return PartFeatures(self.features[index], self.labels[index], self.rows[index])

    def spread(self, most: int) -> "PartFeatures":
        """Return ``most`` rows at most, evenly spread."""
        return self.take(spread_rows(len(self), most))

    def to(self, device: torch.device) -> "PartFeatures":
        """Return a copy on another device."""
        return PartFeatures(self.features.to(device), self.labels.to(device), self.rows.to(device))


@dataclass(frozen=True)
class Features:
    """Features to fit on, features to score on, and the names of the classes: the input of a protocol."""

    train: PartFeatures
    test: PartFeatures
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> "Features":
        """Return a copy on another device."""
        return Features(self.train.to(device), self.test.to(device), self.classes)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is this process's own GPU, or the CPU if there is none.

    Raises:
        UserError: torch does not know the device, or this machine does not have it.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, launcher_number("LOCAL_RANK", 0, least=0))
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # device=meta computes shapes, no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"device={name}: cannot be used ({reason}); try device=auto or device=cpu") from error
    return device


def num_decoders(data: DataConfig, num_images: int) -> int:
    """Return ``data.num_workers``; if that is None, choose by the number of images."""
    if data.num_workers is not None:
        return data.num_workers
    return min(8, usable_cpus()) if num_images >= _WORKERS_FROM else 0


def extract(
    module: nn.Module,
    images: Images,
    data: DataConfig,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    title: str = "",
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Compute features of the centre views; return them in float32 on the CPU, and the row of each.

    Of a video they are the mean over its clips.

    No gradient is computed, and no batch statistic or global random generator is changed.

    Args:
        module: Network from views (b, 3, s, s), or (b, t, 3, s, s), to features (b, d), on ``device``; it is
            put in eval mode.
        images: Images; unreadable ones are left out, with warnings that name some and count all.
        data: How views are cut and normalised.
        batch_size: Images of a forward pass.
        num_workers: Decoding processes; 0 decodes in this process.
        device: Where the forward pass runs.
        title: Text of the progress bar; empty shows none.
    """
    module.eval()
    features: list[Tensor] = []
    rows: list[Tensor] = []

    bad: dict[int, str] = {}
    batches = read_in_order(
        images, batch_size, num_workers=num_workers, device=device, on_corrupt=bad.__setitem__
    )
    with (
        torch.inference_mode(),
        tqdm(
            total=len(images),
            desc=title,
            unit="img",
            file=sys.stderr,
            leave=False,
            disable=None if title else True,  # None: only on a terminal
        ) as bar,
    ):
        for batch in batches:
            if len(batch.ids):
                output = encode_center(module, batch.images.to(device, non_blocking=True), data)
                if output.ndim != 2:
                    raise UserError(
                        f"the network gives features of shape {list(output.shape)}, (images, dimensions) is "
                        "needed; choose another model"
                    )
                features.append(output.float().cpu())
                rows.append(batch.ids)
            bar.update(min(batch_size, len(images) - bar.n))
    # After the bar is gone, or the first would share its line.
    _warn_unreadable(tuple((images.key(row), reason) for row, reason in bad.items()), len(images))
    if not rows:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(rows)


@cache
def _warn_unreadable(bad: tuple[tuple[str, str], ...], total: int) -> None:
    """Name the first files that cannot be read, once, though the encoder and its baselines all read them."""
    for key, reason in bad[:_NAMED]:
        log.warning("%s: left out (%s)", key, reason)
    if len(bad) > _NAMED:
        log.warning(
            "%d of %d files cannot be read, these and %d more; the run's corrupt.csv lists those of training",
            *(len(bad), total, len(bad) - _NAMED),
        )


def read_features(path: Path) -> tuple[Tensor, Tensor] | None:
    """Return cached features and rows; None if the file is missing or damaged."""
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return torch.from_numpy(file["features"]), torch.from_numpy(file["rows"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: damaged (%s), computed again", path, error)
        return None


def write_features(path: Path, features: Float[Tensor, "n d"], rows: Int[Tensor, " n"]) -> None:
    """Cache features and rows; if they cannot be written, only warn."""

    def save(file: Any) -> None:
        np.savez(file, features=features.numpy(), rows=rows.numpy())

    try:
        write_file(path, save)
    except OSError as error:  # the result does not depend on it
        log.warning("%s: features could not be cached (%s)", path, error.strerror)

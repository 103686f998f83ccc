"""Features of a data set under an encoder and its baselines, cached, the encoder proven unchanged."""

import hashlib
import json
import logging
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.images import ArrayImages, SomeImages
from contrastive.data.loader import is_resident
from contrastive.data.reading import decode_all, read_in_order, usable_cpus
from contrastive.data.sources import Images, open_eval, open_held_out, open_train
from contrastive.distributed import all_true, gather_rows, gather_sizes, rank, world_size
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.spec import InputSpec
from eval.config import EvalConfig
from eval.frozen import Checkpoint, open_frozen, seeded, tensor_hash
from memory_bank.replacing import replacing

log = logging.getLogger(__name__)

_CACHE_VERSION = 1
# Images below which decoding processes cost more than they bring.
_WORKERS_FROM = 20_000


@dataclass(frozen=True)
class Split:
    """Features of one part of the data.

    Attributes:
        features: Float32, in the order of ``rows``.
        labels: Classes.
        rows: Row of each in its source; unreadable ones are missing.
    """

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int[Tensor, " m"]) -> "Split":
        """Some of the rows."""
        return Split(self.features[index], self.labels[index], self.rows[index])

    def to(self, device: torch.device) -> "Split":
        """On another device."""
        return Split(self.features.to(device), self.labels.to(device), self.rows.to(device))


@dataclass(frozen=True)
class Features:
    """What a protocol gets: features to fit on, features to score on, names of the classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> "Features":
        """On another device."""
        return Features(self.train.to(device), self.test.to(device), self.classes)


def run_data(run: Path | None) -> DataConfig | None:
    """The data settings of a run, None without a run."""
    return None if run is None else load_saved(PretrainConfig, run / "config.yaml").data


def choose_data(config: EvalConfig, run: Path | None, fed: InputSpec) -> DataConfig:
    """The images to evaluate on, as the encoder wants them fed.

    Raises:
        UserError: no run and no ``data.name``, or images of another size than the encoder's.
    """
    given, own = config.data, run_data(run)
    if own is None and given.name is None:
        raise UserError(
            f"checkpoint={config.checkpoint}: does not belong to a run directory, so its data is unknown; "
            "add data.name=... and data.root=..."
        )
    side = given.image_size or (own.image_size if own is not None else fed.size)
    if side != fed.size:
        source = "data.image_size" if given.image_size else f"the run's data.image_size in {run}/config.yaml"
        raise UserError(
            f"{source} is {side}, the encoder takes {fed.size}; leave data.image_size out or train an "
            f"encoder with data.image_size={side}"
        )
    base = own if own is not None else DataConfig(name=str(given.name))
    if given.name is not None and given.name != base.name:
        base = replace(base, name=given.name, root=None)
    chosen = {
        name: value
        for name in ("root", "num_workers", "download")
        if (value := getattr(given, name)) is not None
    }
    return replace(base, image_size=side, decode_size=fed.decode_size, mean=fed.mean, std=fed.std, **chosen)


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one; of several processes each takes its own.

    Raises:
        UserError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # device=meta computes shapes, no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: cannot be used ({reason}); try device=auto or device=cpu") from error
    return device


@dataclass(frozen=True)
class Network:
    """What a protocol gets that needs other views than the centre ones, or changes the network.

    Attributes:
        module: Views (b, 3, s, s) to features (b, d), in evaluation mode; not to be changed, copy it.
        features: Of the centre views, on ``device``.
        images: The training images; ``features.train.rows`` are rows of it.
        test: The test images, likewise.
        data: How views are cut and normalised.
        device: Where to compute.
        title: Of progress bars; empty shows none.
    """

    module: nn.Module
    features: Features
    images: Images
    test: Images
    data: DataConfig
    device: torch.device
    title: str = ""


class Extractor:
    """Features of one data set under an encoder and its baselines, each computed once and kept on disk.

    Where several processes have joined, each computes its share, and all calls are collective.

    Args:
        config: ``batch_size``, ``device``, ``baselines`` and ``data`` count.
        checkpoint: Where the encoder is.
        labelled: Whether labels are needed. Without them the training part is all that pretraining sees.
        encoder: See ``open_frozen``.

    Attributes:
        frozen: The encoder.
        data: Which images, and how they are fed.
        device: Where the forward pass runs.
        parts: ``train`` and, where the source has labels, ``test``.
        held_out: Whether the test part was held out by a hash.
        classes: Names of the classes.
        fingerprints: Of each part.
        unreadable: Images of each part that could not be read, once its features are there.

    Raises:
        UserError: the encoder or the data cannot be used.
    """

    def __init__(
        self,
        config: EvalConfig,
        checkpoint: Checkpoint,
        *,
        labelled: bool = True,
        encoder: Encoder | None = None,
    ) -> None:
        self.config, self._labelled = config, labelled
        self.frozen = open_frozen(
            checkpoint,
            image_size=config.data.image_size,
            seed=config.baselines.random_seed,
            encoder=encoder,
        )
        self.data = choose_data(config, checkpoint.run, self.frozen.input)
        self.device = choose_device(config.device)
        self.parts: dict[str, Images] = {}
        self.held_out = False
        self.classes: tuple[str, ...] = ()
        if labelled:
            self.parts["train"], self.parts["test"], self.held_out = open_eval(self.data)
            self.classes = _check_labels(self.parts["train"], self.parts["test"])
        else:
            self.parts["train"] = open_train(self.data)
            if open_held_out(self.data) is not None:
                _, self.parts["test"], self.held_out = open_eval(self.data)
        self.fingerprints = {name: images.fingerprint() for name, images in self.parts.items()}
        self.unreadable: dict[str, int] = {}
        self._cache = checkpoint.home / "eval" / "cache"

    def features(self, name: str) -> Features:
        """Those of one of ``modules``."""
        splits = self.splits(name)
        return Features(splits["train"], splits["test"], self.classes)

    def network(self, name: str) -> Network:
        """One of ``modules`` with the images it is to see."""
        return Network(
            self.modules()[name]().to(self.device),
            self.features(name).to(self.device),
            self._decoded_train,
            self.parts["test"],
            self.data,
            self.device,
            name.replace("_", " ") if self.config.progress else "",
        )

    @cached_property
    def _decoded_train(self) -> Images:
        """The training images, decoded once and kept where they are few enough to stay in memory."""
        images = self.parts["train"]
        if not is_resident(images, self.data):
            return images
        pixels, _ = decode_all(images, progress=self.config.progress)  # unreadable rows have no features
        array = pixels.permute(0, 2, 3, 1).numpy()
        return ArrayImages("train", [array], images.size, labels=images.labels, classes=images.classes)

    def modules(self) -> dict[str, Callable[[], nn.Module]]:
        """The encoder, and what every number is compared with.

        - ``raw_pixels``: the centre view averaged down to ``baselines.raw_size``;
        - ``random_encoder``: a network of the same shape that was never trained.
        """
        side = min(self.config.baselines.raw_size, self.data.image_size)
        return {
            "encoder": lambda: self.frozen.module,
            "raw_pixels": lambda: _Pixels(side),
            "random_encoder": self._build_random,
        }

    def splits(self, name: str) -> dict[str, Split]:
        """Features of each part under one of ``modules``."""
        build, title = self.modules()[name], name.replace("_", " ")
        fed = [self.data.image_size, self.data.stored_size, *self.data.mean, *self.data.std]
        splits = {}
        for part, images in self.parts.items():
            text = json.dumps([_CACHE_VERSION, self._identity(name), self.fingerprints[part], *fed])
            path = self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
            splits[part] = self._split(*self._cached(path, build, images, f"{title}: {part}"), part, title)
        return splits

    def _identity(self, name: str) -> str:
        """What the features depend on, beside the images and how they are fed."""
        if name == "encoder":
            return f"encoder {self.frozen.sha256}"
        if name == "raw_pixels":
            return f"raw {min(self.config.baselines.raw_size, self.data.image_size)}"
        return f"random {self.config.baselines.random_seed} {self.frozen.shape} {torch.__version__}"

    def _build_random(self) -> nn.Module:
        with seeded(self.config.baselines.random_seed):
            return self.frozen.build_random().eval()

    def _cached(
        self, path: Path, build: Callable[[], nn.Module], images: Images, title: str
    ) -> tuple[Tensor, Tensor]:
        found = _read_cache(path)
        # Every process looks for itself: one may see a file that another does not see yet.
        everywhere = all_true(torch.tensor(found is not None, device=self.device))
        if found is not None and everywhere:
            return found
        features, rows = self._extract(build().to(self.device), images, title)
        if rank() == 0:
            _write_cache(path, features, rows)
        return features, rows

    def _split(self, features: Tensor, rows: Tensor, part: str, title: str) -> Split:
        images = self.parts[part]
        self.unreadable[part] = len(images) - len(rows)
        if not len(rows):
            raise UserError(
                f"{part} part of data.name={self.data.name}: none of its {len(images)} images can be read"
            )
        bad = int((~features.isfinite().all(1)).sum())
        if bad:
            raise UserError(
                f"{title}: features of {bad} of {len(rows)} {part} images are NaN or infinite, no score "
                "means anything; take an earlier checkpoint (runs/NAME/checkpoints/step-N)"
            )
        labels = torch.full((len(images),), -1) if images.labels is None else images.labels
        split = Split(features, labels[rows], rows)
        return split.take((split.labels >= 0).nonzero()[:, 0]) if self._labelled else split

    def _extract(self, module: nn.Module, images: Images, title: str) -> tuple[Tensor, Tensor]:
        """Features of all images, each process computing those of consecutive rows."""
        ends = [len(images) * part // world_size() for part in range(world_size() + 1)]
        own = torch.arange(ends[rank()], ends[rank() + 1])
        before = tensor_hash(module)
        features, rows = extract(
            module,
            SomeImages(images, own),
            self.data,
            batch_size=self.config.batch_size,
            num_workers=num_decoders(self.data, len(own)),
            device=self.device,
            title=title if self.config.progress and rank() == 0 else "",
        )
        if tensor_hash(module) != before:
            raise RuntimeError(f"{title}: the encoder's parameters or buffers changed while it was evaluated")
        return _gather(features, own[rows], self.device)


def _gather(features: Tensor, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of all processes, by rank, on the CPU."""
    if world_size() == 1:
        return features, rows
    width = max(gather_sizes(features.shape[1], device))  # a share without a readable image knows none
    parts = (features.reshape(len(rows), width), rows)
    gathered = [gather_rows(part.to(device)).cpu() for part in parts]
    return gathered[0], gathered[1]


def num_decoders(data: DataConfig, num_images: int) -> int:
    """Decoding processes: as ``data.num_workers`` says, or by how much there is to do."""
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
    """Frozen features of the centre views, float32 on the CPU, and the row of each.

    Args:
        module: Views (b, 3, s, s) to features (b, d); put in eval mode, on ``device``.
        images: Unreadable ones are left out, and told to the log.
        data: How views are cut and normalised.
        batch_size: Images of a forward pass.
        num_workers: Decoding processes; 0 decodes here.
        device: Where the forward pass runs.
        title: Of the progress bar; empty shows none.
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
            total=len(images), desc=title, unit="img", file=sys.stderr, leave=False, disable=not title
        ) as bar,
    ):
        for batch in batches:
            if len(batch.ids):
                views = center_view(batch.images.to(device, non_blocking=True), data)
                found = module(views)
                if found.ndim != 2:
                    raise UserError(
                        f"the network gives features of shape {list(found.shape)}, (images, dimensions) is "
                        "needed; choose another model"
                    )
                features.append(found.float().cpu())
                rows.append(batch.ids)
            bar.update(min(batch_size, len(images) - bar.n))
    for row, reason in bad.items():  # once the bar is gone, or the first would stand in its line
        _tell(images.key(row), reason)
    if not rows:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(rows)


@cache
def _tell(key: str, reason: str) -> None:
    """Once a file: the encoder and its baselines all read the same ones."""
    log.warning("%s: left out (%s)", key, reason)


class _Pixels(nn.Module):
    """Views averaged down to ``side`` and flattened."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, views: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(views, self.side).flatten(1)


def _check_labels(train: Images, test: Images) -> tuple[str, ...]:
    """Names of the classes.

    Raises:
        UserError: no labels, or fewer than two classes to tell apart.
    """
    if train.labels is None or test.labels is None or train.classes is None:
        raise UserError(
            "the data has no labels, evaluation needs some; use data.name=imagefolder with class folders"
        )
    seen = sorted({*train.labels.tolist()} - {-1})
    if len(seen) < 2:
        names = ", ".join(train.classes[label] for label in seen)
        raise UserError(
            f"the training part has one class only ({names}), there is nothing to tell apart; add another"
        )
    return tuple(train.classes)


def _read_cache(path: Path) -> tuple[Tensor, Tensor] | None:
    """Features and rows; None where nothing, or nothing whole, is there."""
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return torch.from_numpy(file["features"]), torch.from_numpy(file["rows"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: damaged (%s), computed again", path, error)
        return None


def _write_cache(path: Path, features: Tensor, rows: Tensor) -> None:
    def save(file: Any) -> None:
        np.savez(file, features=features.numpy(), rows=rows.numpy())

    try:
        write_file(path, save)
    except OSError as error:  # the result does not depend on it
        log.warning("%s: features could not be cached (%s)", path, error.strerror)


def open_results(folder: Path) -> None:
    """Prove that results can be written to a folder, before anything is computed; writing makes the folder.

    Raises:
        UserError: they cannot.
    """
    try:
        check_folder(folder)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error


def check_folder(folder: Path) -> None:
    """Make and remove a file in ``folder``, or in the nearest folder above where it does not exist yet.

    Raises:
        OSError: no file can be made there.
        ValueError: a name that no file can have.
    """
    while not _exists(folder):
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a result, whole or not at all.

    Raises:
        UserError: it cannot be written: the disk is full, a folder is in its place.
    """
    try:
        write_file(path, lambda file: file.write(text.encode()))
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{str(path)!r}: results cannot be written there ({reason}); set out=FOLDER to another")


def write_file(path: Path, save: Callable[[Any], None]) -> None:
    """Let ``save`` write a binary file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        save(file)

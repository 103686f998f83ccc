"""One door to the frozen encoder: from a path to cached features and labels, the encoder proven unchanged."""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, PretrainConfig, UserError, load_saved
from contrastive.data.reading import read_in_order, usable_cpus
from contrastive.data.sources import Images, open_eval
from contrastive.encoders.build import build_encoder
from contrastive.encoders.weights import EncoderMeta, load_encoder
from eval.config import EvalConfig
from memory_bank.shapes import Float, Int

log = logging.getLogger(__name__)

_CACHE_VERSION = 1
_ENCODER_FILE = "encoder.safetensors"
_CHECKPOINT = re.compile(r"step-\d+")
# Images below which decoding processes cost more than they bring.
_WORKERS_FROM = 20_000

Represent = Callable[[Tensor], Tensor]  # views (b, 3, s, s) -> features (b, d)


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


@dataclass(frozen=True)
class Checkpoint:
    """Where an encoder is, and what is known of the run it comes from.

    Attributes:
        encoder: An ``encoder.safetensors``.
        run: The run directory, None for a file of unknown origin.
        results: Folder of the results.
    """

    encoder: Path
    run: Path | None
    results: Path


def resolve(path: str, out: str | None = None) -> Checkpoint:
    """Find the encoder of a run directory, a checkpoint directory, or take the file itself.

    Results of a run's encoder go to ``<run>/eval``, of one of its checkpoints to ``<run>/eval/step-N``.

    Raises:
        UserError: nothing there, or no encoder in it.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(
            f"checkpoint={path}: does not exist; give a run directory (runs/NAME), "
            f"a checkpoint directory (runs/NAME/checkpoints/step-N) or an {_ENCODER_FILE}"
        )
    encoder = given if given.is_file() and given.name != "last" else _inside(given)
    if not encoder.is_file():
        raise UserError(
            f"checkpoint={path}: holds no {_ENCODER_FILE}; give a run directory (runs/NAME), "
            f"a checkpoint directory (runs/NAME/checkpoints/step-N) or the file"
        )
    folder = encoder.absolute().parent
    if (folder / "config.yaml").is_file():
        run, results = folder, folder / "eval"
    elif folder.parent.name == "checkpoints" and (folder.parents[1] / "config.yaml").is_file():
        run = folder.parents[1]
        results = run / "eval" / ("" if given.absolute() == run else folder.name)
    else:
        run, results = None, folder / "eval"
    return Checkpoint(encoder, run, Path(out).expanduser() if out else results)


def _inside(given: Path) -> Path:
    """The encoder file a directory, or a ``last`` pointer, leads to; never out of the pointer's folder."""
    if given.is_file():  # `last`: a line with the name of the newest checkpoint
        name = given.read_text(errors="replace").strip()
        encoder = given.parent / name / _ENCODER_FILE
        if not _CHECKPOINT.fullmatch(name) or not encoder.resolve().is_relative_to(given.parent.resolve()):
            raise UserError(
                f"{given}: names {name!r:.80}; only a checkpoint beside it is followed, give its directory"
            )
        return encoder
    own = given / _ENCODER_FILE
    last = given / "checkpoints" / "last"
    return own if own.is_file() or not last.is_file() else _inside(last)


def run_data(run: Path | None) -> DataConfig | None:
    """The data settings of a run, None without a run."""
    return None if run is None else load_saved(PretrainConfig, run / "config.yaml").data


def choose_data(config: EvalConfig, run: Path | None, meta: EncoderMeta) -> DataConfig:
    """The images to evaluate on, as the encoder wants them fed.

    Raises:
        UserError: no run and no ``data.name``, or images of another size than the encoder's.
    """
    given, own = config.data, run_data(run)
    if own is None and given.name is None:
        raise UserError(
            f"checkpoint={config.checkpoint}: is not inside a run directory, so its data is unknown; "
            "add data.name=... and data.root=..."
        )
    side = given.image_size or (own.image_size if own is not None else meta.image_size)
    if side != meta.image_size:
        source = "data.image_size" if given.image_size else f"the run's data.image_size in {run}/config.yaml"
        raise UserError(
            f"{source} is {side}, the encoder takes {meta.image_size}; leave data.image_size out or train an "
            f"encoder with data.image_size={side}"
        )
    base = own if own is not None else DataConfig(name=str(given.name))
    if given.name is not None and given.name != base.name:
        base = replace(base, name=given.name, root=None)
    fed: dict[str, Any] = {
        "image_size": side,
        "decode_size": meta.decode_size,
        "mean": meta.mean,
        "std": meta.std,
    }
    chosen = {
        name: value
        for name in ("root", "num_workers", "download")
        if (value := getattr(given, name)) is not None
    }
    return replace(base, **fed, **chosen)


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        UserError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: cannot be used ({reason}); try device=auto or device=cpu") from error
    return device


class Extractor:
    """Features of one data set under an encoder and its baselines, each computed once and kept on disk.

    Args:
        config: ``batch_size``, ``device``, ``baselines`` and ``data`` count.
        checkpoint: Where the encoder is.

    Raises:
        UserError: the encoder or the data cannot be used.
    """

    def __init__(self, config: EvalConfig, checkpoint: Checkpoint) -> None:
        self.config = config
        self.encoder_sha256 = hashlib.sha256(checkpoint.encoder.read_bytes()).hexdigest()
        self._encoder, self.meta = load_encoder(checkpoint.encoder)
        self.data = choose_data(config, checkpoint.run, self.meta)
        self.device = choose_device(config.device)
        train, test, self.held_out = open_eval(self.data)
        self.parts = {"train": train, "test": test}
        self.classes = _check_labels(train, test)
        self.fingerprints = {name: images.fingerprint() for name, images in self.parts.items()}
        self.unreadable: dict[str, int] = {}
        self._cache = (checkpoint.run or checkpoint.encoder.parent) / "eval" / "cache"

    def encoder(self) -> Features:
        """Features of the frozen encoder."""
        return self._features(f"encoder {self.encoder_sha256}", lambda: self._encoder, "encoder")

    def raw_pixels(self) -> Features:
        """The pixels of the centre view, averaged down to ``baselines.raw_size``."""
        side = min(self.config.baselines.raw_size, self.data.image_size)
        return self._features(f"raw {side}", lambda: _Pixels(side), "raw pixels")

    def random_encoder(self) -> Features:
        """Features of an encoder of the same shape that was never trained."""
        seed = self.config.baselines.random_seed
        shape = f"{self.meta.encoder.name} {self.meta.encoder.width} {self.meta.encoder.stem}"
        return self._features(
            f"random {seed} {shape} {torch.__version__}", self._build_random, "random encoder"
        )

    def representations(self) -> dict[str, Callable[[], Features]]:
        """The encoder and its baselines, by the names they have in results."""
        return {
            "encoder": self.encoder,
            "raw_pixels": self.raw_pixels,
            "random_encoder": self.random_encoder,
        }

    def _build_random(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.baselines.random_seed)
            return build_encoder(self.meta.encoder, self.meta.image_size).eval()

    def _features(self, what: str, build: Callable[[], nn.Module], title: str) -> Features:
        fed = [self.data.image_size, self.data.stored_size, *self.data.mean, *self.data.std]
        splits = {}
        for part, images in self.parts.items():
            text = json.dumps([_CACHE_VERSION, what, self.fingerprints[part], *fed])
            path = self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
            found = _read_cache(path)
            if found is None:
                found = self._extract(build().to(self.device), images, f"{title}: {part}")
                _write_cache(path, *found)
            splits[part] = self._split(*found, part, title)
        return Features(splits["train"], splits["test"], self.classes)

    def _split(self, features: Tensor, rows: Tensor, part: str, title: str) -> Split:
        images = self.parts[part]
        assert images.labels is not None
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
        labels = images.labels[rows]
        known = labels >= 0
        return Split(features[known], labels[known], rows[known])

    def _extract(self, module: nn.Module, images: Images, title: str) -> tuple[Tensor, Tensor]:
        workers = self.data.num_workers
        if workers is None:
            workers = min(8, usable_cpus()) if len(images) >= _WORKERS_FROM else 0
        before = tensor_hash(module)
        found = extract(
            module,
            images,
            self.data,
            batch_size=self.config.batch_size,
            num_workers=workers,
            device=self.device,
            title=title if self.config.progress else "",
        )
        if tensor_hash(module) != before:
            raise RuntimeError(f"{title}: the encoder's parameters or buffers changed while it was evaluated")
        return found


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

    def report(row: int, reason: str) -> None:
        log.warning("%s: left out (%s)", images.key(row), reason)

    batches = read_in_order(images, batch_size, num_workers=num_workers, device=device, on_corrupt=report)
    with (
        torch.inference_mode(),
        tqdm(
            total=len(images), desc=title, unit="img", file=sys.stderr, leave=False, disable=not title
        ) as bar,
    ):
        for batch in batches:
            if len(batch.ids):
                views = center_view(batch.images.to(device, non_blocking=True), data)
                features.append(module(views).float().cpu())
                rows.append(batch.ids)
            bar.update(min(batch_size, len(images) - bar.n))
    if not rows:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(rows)


def tensor_hash(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every parameter and buffer, batch statistics included."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    except FileNotFoundError:
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


def write_file(path: Path, save: Callable[[Any], None]) -> None:
    """Let ``save`` write a binary file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Compute the features of an encoder and of its baselines, once each, and check that no network changed."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive.config import DataConfig, UserError
from contrastive.data.arrays import DecodedImages
from contrastive.data.dataset import Dataset, as_dataset, open_dataset
from contrastive.data.images import Images
from contrastive.data.loader import is_resident
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from contrastive.distributed import all_true, gather_rows, gather_sizes, rank, world_size
from contrastive.encoders.encoder import Encoder
from eval.blind_to_time import ShuffledFrames, SingleFrame
from eval.config import EvalConfig
from eval.eval_data import check_labels, choose_data, other_place, title_of
from eval.features import (
    Features,
    PartFeatures,
    choose_device,
    extract,
    num_decoders,
    read_features,
    write_features,
)
from eval.frozen import EncoderLocation, open_frozen, seeded, tensor_hash

_CACHE_VERSION = 1
_TITLE_LENGTH = 40  # characters of a data set's name in that of a folder


@dataclass(frozen=True)
class Network:
    """A network with its images: the input of a protocol that needs more than features of centre views.

    Attributes:
        module: Network from views (b, 3, s, s), or (b, t, 3, s, s), to features (b, d); in eval mode.
        features: Features of the centre views, on ``device``.
        images: The training images; ``features.train.rows`` are rows of it.
        test: The test images; ``features.test.rows`` are rows of it.
        data: How views are cut and normalised.
        device: Where to compute.
        title: Text of progress bars; empty shows none.
    """

    module: nn.Module
    features: Features
    images: Images
    test: Images
    data: DataConfig
    device: torch.device
    title: str = ""


class Extractor:
    """Compute features of one data set under an encoder and its baselines, once each; cache them on disk.

    If several processes have joined, each computes a share, and all must make the same calls.

    Args:
        config: ``batch_size``, ``device``, ``baselines``, ``data`` and ``progress`` are used.
        location: Where the encoder is.
        labelled: Whether labels are needed. If not, the training part is all images that pretraining sees.
            None: as if needed if there are labels and a test part, else as if not.
        dataset: The images, if they are already open; None opens those of the settings.
        encoder: See ``open_frozen``.
        open_data: Opens the images, if they are not given.

    Attributes:
        location: As given; results on other images than the run's own have a folder of their own.
        other: Place of images that are not the run's own, else empty; see ``other_place``.
        frozen: The encoder.
        labelled: Whether labels are used.
        data: Settings of the images, and of how they become the network's input.
        device: Where the forward pass runs.
        parts: Images of ``train`` and, if the source has labels, of ``test``.
        held_out: Whether the test part was held out by a hash.
        classes: Names of the classes.
        fingerprints: Fingerprint of each part.
        unreadable: Number of images of each part that could not be read, known once its features are.

    Raises:
        UserError: the encoder or the data cannot be used.
    """

    def __init__(
        self,
        config: EvalConfig,
        location: EncoderLocation,
        *,
        labelled: bool | None = True,
        dataset: Dataset | None = None,
        encoder: Encoder | None = None,
        open_data: Callable[[DataConfig], Dataset] = open_dataset,
    ) -> None:
        self.config = config
        self.frozen = open_frozen(
            location,
            image_size=config.data.image_size,
            seed=config.baselines.random_seed,
            encoder=encoder,
        )
        self.data = choose_data(config, location.run, self.frozen.input)
        self.device = choose_device(config.device)
        dataset = open_data(self.data) if dataset is None else as_dataset(dataset, self.data)
        self.parts: dict[str, Images] = {"train": dataset.train}
        self.held_out = dataset.held_out_by_hash
        if labelled is None:
            labelled = dataset.labelled is not None and dataset.test is not None
        self.labelled = labelled
        self.classes: tuple[str, ...] = ()
        if labelled:
            self.parts["train"], self.parts["test"] = dataset.labelled_parts(self.data.name)
            self.classes = check_labels(self.parts["train"], self.parts["test"])
        elif dataset.test is not None:
            self.parts["test"] = dataset.test
        self.fingerprints = {name: images.fingerprint() for name, images in self.parts.items()}
        self._revisions = {name: images.revision() for name, images in self.parts.items()}
        self.other = other_place(location.run, self.data, dataset.train)
        self.location = location if config.out or not self.other else _apart(location, self.other)
        self.unreadable: dict[str, int] = {}
        self._cache = location.home / "eval" / "cache"
        self._others: dict[str, Callable[[], nn.Module]] = {}

    def compare_with(self, name: str, module: nn.Module) -> None:
        """Add a network to ``modules``; it takes the encoder's views.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.modules():
            raise ValueError(f"{name!r}: is compared with already; give another name")
        module.eval()
        self._others[name] = lambda: module

    def add_part(self, name: str, images: Images) -> None:
        """Add images to compute features of."""
        self.parts[name] = images
        self.fingerprints[name], self._revisions[name] = images.fingerprint(), images.revision()

    def features(self, name: str) -> Features:
        """Return the features of one of ``modules``."""
        parts = self.part_features(name)
        return Features(parts["train"], parts["test"], self.classes)

    def network(self, name: str) -> Network:
        """Return one of ``modules`` with its features and images."""
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
        """Return the training images, decoded once and kept in memory if they are few enough."""
        images = self.parts["train"]
        if images.are_videos or not is_resident(images, self.data):  # training needs other frames of videos
            return images
        pixels = decode_all(images, progress=self.config.progress).images  # unreadable rows have no features
        return DecodedImages("train", pixels, images.labels, images.classes)

    def modules(self) -> dict[str, Callable[[], nn.Module]]:
        """Return a function that builds each network: ``encoder``, and the baselines it is compared with.

        - ``raw_pixels``: the centre view, or the mean of its frames, averaged down to ``baselines.raw_size``;
        - ``random_encoder``: a network of the same shape that was never trained;
        - for clips, what time adds: ``single_frame``, the same encoder on the middle frame alone, shown all
          the time, and ``shuffled_frames``, on the frames in an order that says nothing;
        - those that ``compare_with`` added.
        """
        side = min(self.config.baselines.raw_size, self.data.image_size)
        clips: dict[str, Callable[[], nn.Module]] = {
            "single_frame": lambda: SingleFrame(self.frozen.module),
            "shuffled_frames": lambda: ShuffledFrames(self.frozen.module),
        }
        return {
            "encoder": lambda: self.frozen.module,
            "raw_pixels": lambda: _Pixels(side),
            "random_encoder": self._build_random,
            **(clips if self.data.frames > 1 else {}),
            **self._others,
        }

    def part_features(self, name: str) -> dict[str, PartFeatures]:
        """Return the features of each part under one of ``modules``."""
        build, title = self.modules()[name], name.replace("_", " ")
        data = self.data
        input_spec = [data.image_size, data.stored_size, *data.mean, *data.std]
        if self.parts["train"].are_videos:
            input_spec += [data.frames, data.frame_step, data.fps or 0, data.clips_per_video]
        features = {}
        for part, images in self.parts.items():
            text = json.dumps([_CACHE_VERSION, self._identity(name), self._revisions[part], *input_spec])
            path = self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
            features[part] = self._labelled_part(
                *self._cached(path, build, images, f"{title}: {part}"), part, title
            )
        return features

    def _identity(self, name: str) -> str:
        """Return what the features depend on besides the images: a part of the cache key."""
        if name == "encoder":
            return f"encoder {self.frozen.sha256}"
        if name == "raw_pixels":
            return f"raw {min(self.config.baselines.raw_size, self.data.image_size)}"
        if name in ("single_frame", "shuffled_frames"):
            return f"{name} {self.frozen.sha256}"
        if name in self._others:
            return f"other {tensor_hash(self._others[name]())}"
        return f"random {self.config.baselines.random_seed} {self.frozen.shape} {torch.__version__}"

    def _build_random(self) -> nn.Module:
        with seeded(self.config.baselines.random_seed):
            return self.frozen.build_random().eval()

    def _cached(
        self, path: Path, build: Callable[[], nn.Module], images: Images, title: str
    ) -> tuple[Tensor, Tensor]:
        cached = read_features(path)
        # All processes must agree: one may see a file that another does not see yet.
        everywhere = all_true(torch.tensor(cached is not None, device=self.device))
        if cached is not None and everywhere:
            return cached
        features, rows = self._extract(build().to(self.device), images, title)
        if rank() == 0:
            write_features(path, features, rows)
        return features, rows

    def _labelled_part(self, features: Tensor, rows: Tensor, part: str, title: str) -> PartFeatures:
        images = self.parts[part]
        self.unreadable[part] = len(images) - len(rows)
        if not len(rows):
            raise UserError(
                f"{part} part of data.name={self.data.name}: none of its {len(images)} {images.noun} "
                "can be read"
            )
        bad = int((~features.isfinite().all(1)).sum())
        if bad:
            raise UserError(
                f"{title}: features of {bad} of {len(rows)} {part} {images.noun} are NaN or infinite, no "
                "score means anything; take an earlier checkpoint (runs/NAME/checkpoints/step-N)"
            )
        labels = torch.full((len(images),), -1) if images.labels is None else images.labels
        found = PartFeatures(features, labels[rows], rows)
        return found.take((found.labels >= 0).nonzero()[:, 0]) if self.labelled else found

    def _extract(self, module: nn.Module, images: Images, title: str) -> tuple[Tensor, Tensor]:
        """Compute features of all images; each process computes those of a block of rows."""
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


def _apart(location: EncoderLocation, place: str) -> EncoderLocation:
    """Move results on other images than the run's own into ``on-NAME-HASH``, so that they replace none."""
    name = re.sub(r"[^\w.-]+", "-", f"on-{title_of(place)[:_TITLE_LENGTH]}")
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:6]
    return replace(location, results=location.results / f"{name}-{digest}")


def _gather(features: Tensor, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Concatenate features and rows of all processes, by rank, on the CPU."""
    if world_size() == 1:
        return features, rows
    width = max(gather_sizes(features.shape[1], device))  # a share without a readable image has width 0
    parts = (features.reshape(len(rows), width), rows)
    gathered = [gather_rows(part.to(device)).cpu() for part in parts]
    return gathered[0], gathered[1]


class _Pixels(nn.Module):
    """Average views down to ``side`` and flatten them: the raw-pixel baseline."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, views: Tensor) -> Tensor:
        images = views.mean(1) if views.ndim == 5 else views
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)

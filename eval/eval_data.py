"""Choose the images to evaluate on, and check that they have labels."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from contrastive.config import DataConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.dataset import GIVEN
from contrastive.data.image_list import describe_changes, read_image_list
from contrastive.data.images import Images
from contrastive.encoders.spec import InputSpec
from eval.config import EvalConfig

_FOLDERS = ("images", "imagefolder", "clips")
"""Sources that read any folder, each in its way."""

PACKED = ("shards", "hf")
"""Sources whose rows are not files: their names and stamps compare with those of the same source alone."""


def other_place(run: Path | None, data: DataConfig, trained: Images) -> str:
    """Return the place of images that are not the run's own; empty if they are, or if no run is known.

    A run's own images are those of its source and folder, and those of its manifest.csv wherever they are.

    Args:
        run: The run directory.
        data: Settings that the images were opened with.
        trained: Images that pretraining would see.
    """
    own = run_data(run)
    if run is None or own is None:
        return ""
    place = _place_of(data.name, data.root, trained.fingerprint() if data.name == GIVEN else "")
    same = place == _place_of(own.name, own.root) or _holds(run / "manifest.csv", trained)
    return "" if data.name == own.name and same else place


def place_of_result(own: DataConfig | None, data: Mapping[str, Any]) -> str:
    """Return what ``other_place`` said when a result was made; for those of before, what their root says now.

    Args:
        own: Data settings of the run.
        data: ``data`` of the result.
    """
    if "other" in data:
        return str(data["other"])
    place = _place_of(str(data["name"]), data.get("root"))
    return "" if own is None or place == _place_of(own.name, own.root) else place


def title_of(place: str) -> str:
    """Return a short name of a place: its folder's, or that of a source that is a data set (``cifar10``)."""
    source, _, path = place.partition(" ")
    return (source in (*_FOLDERS, *PACKED) and os.path.basename(path)) or source


def _place_of(name: str, root: str | None, content: str = "") -> str:
    """Return a text that identifies a data set by its source, and by where it lies or its ``content``."""
    path = os.path.expanduser(root or "")
    where = os.path.realpath(path) if os.path.exists(path) else path
    return f"{name}-{content[:8]}" if content else f"{name} {where}".rstrip()


def _holds(manifest: Path, images: Images) -> bool:
    """Return whether a run's list of images is that of ``images``."""
    return manifest.is_file() and not describe_changes(read_image_list(manifest), images)


def run_data(run: Path | None) -> DataConfig | None:
    """Return the data settings of a run, or None if there is no run.

    A relative ``data.root`` is that of the folder where training began, if it is still there.
    """
    if run is None:
        return None
    file = run / "config.yaml"
    data = load_saved(PretrainConfig, file).data
    began = OmegaConf.select(OmegaConf.load(file), "provenance.root")
    if (
        not began
        or not os.path.isdir(began)
        or os.path.realpath(os.path.expanduser(data.root or "")) == began
    ):
        return data
    return replace(data, root=began)


def choose_data(config: EvalConfig, run: Path | None, spec: InputSpec) -> DataConfig:
    """Return the run's data settings, overridden by ``config.data``, with the encoder's input size and mean.

    Raises:
        UserError: no run and no ``data.name``, or an image size other than the encoder's.
    """
    given, own = config.data, run_data(run)
    if own is None and given.name is None:
        raise UserError(
            f"checkpoint={config.checkpoint}: does not belong to a run directory, so its data is unknown; "
            "add data.name=... and data.root=..."
        )
    side = given.image_size or (own.image_size if own is not None else spec.size)
    if side != spec.size:
        source = "data.image_size" if given.image_size else f"the run's data.image_size in {run}/config.yaml"
        raise UserError(
            f"{source} is {side}, the encoder takes {spec.size}; leave data.image_size out or train an "
            f"encoder with data.image_size={side}"
        )
    base = own if own is not None else DataConfig(name=str(given.name))
    if given.name is not None and given.name != base.name:
        same_folder = {given.name, base.name} <= {*_FOLDERS}
        base = replace(base, name=given.name, root=base.root if same_folder else None)
    chosen: dict[str, Any] = {
        name: value
        for name in ("root", "num_workers", "download", "clips_per_video")
        if (value := getattr(given, name)) is not None
    }
    chosen["hf"] = replace(base.hf, **{name: column for name, column in vars(given.hf).items() if column})
    if given.fps is not None or given.frame_step is not None:  # one of the two replaces the run's
        chosen |= {"fps": given.fps, "frame_step": given.frame_step or 1}
    return replace(
        base,
        image_size=side,
        decode_size=spec.decode_size,
        mean=spec.mean,
        std=spec.std,
        frames=spec.frames,
        white=spec.white if given.white is None else given.white,
        **chosen,
    )


def check_labels(train: Images, test: Images) -> tuple[str, ...]:
    """Return the names of the classes.

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

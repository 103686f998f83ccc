"""Find the encoder that ``checkpoint=`` names, load it, and describe its input and its random twin."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.config import UserError
from contrastive.data.files import shorten
from contrastive.encoders.build import build_arch
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.foreign import RANDOM, Foreign, load_foreign, parse_foreign
from contrastive.encoders.library import LibraryEncoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import EncoderInfo, load_encoder

_ENCODER_FILE = "encoder.safetensors"
_CHECKPOINT = re.compile(r"step-\d+")


@dataclass(frozen=True)
class EncoderLocation:
    """Location of an encoder, and the run it comes from.

    Attributes:
        encoder: An ``encoder.safetensors``, or a network of another library.
        run: The run directory, None where the origin is unknown.
        home: Folder whose ``eval/`` holds results and cached features.
        results: Folder of the results.
    """

    encoder: Path | Foreign
    run: Path | None
    home: Path
    results: Path


@dataclass(frozen=True)
class Frozen:
    """An encoder under evaluation.

    Attributes:
        module: Views (b, 3, s, s) to features (b, d), in evaluation mode.
        build_random: Another network of the same shape, its weights drawn from torch's global generator.
        shape: Text that identifies the shape: a part of the cache's key.
        sha256: Hash of our file, or of the tensors of another library's network.
        input: Size and normalisation of the images it takes.
        about: Description of it in the results.
    """

    module: nn.Module
    build_random: Callable[[], nn.Module]
    shape: str
    sha256: str
    input: InputSpec
    about: dict[str, Any]


def resolve(path: str, out: str | None = None) -> EncoderLocation:
    """Find the newest encoder of a run directory, that of a checkpoint directory, or take the file or name.

    Results of a run's encoder go to ``<run>/eval``, of one of its checkpoints to ``<run>/eval/step-N``, of
    another library's network to ``runs/<library>-<model>-<weights>/eval``.

    Raises:
        UserError: the path does not exist, or holds no encoder.
    """
    if (foreign := parse_foreign(path)) is not None:
        home = Path("runs") / foreign.slug
        return EncoderLocation(foreign, None, home, _results(home / "eval", out))
    given = Path(path)
    if not given.exists():
        runs = [str(config.parent) for config in sorted(given.parent.glob("*/config.yaml"))]
        raise UserError(
            f"checkpoint={path}: does not exist; give a run directory (runs/NAME), a checkpoint directory "
            f"(runs/NAME/checkpoints/step-N), an {_ENCODER_FILE}, or torchvision:MODEL or timm:MODEL"
            + (f"; the runs there are {shorten(runs)}" if runs else "")
        )
    encoder = given if given.is_file() and given.name != "last" else _find_inside(given)
    if not encoder.is_file():
        raise UserError(
            f"checkpoint={path}: holds no {_ENCODER_FILE}; give a run directory (runs/NAME), "
            f"a checkpoint directory (runs/NAME/checkpoints/step-N) or the file"
        )
    if encoder.suffix != ".safetensors":
        raise UserError(
            f"checkpoint={path}: not a .safetensors file; weights of another library are given as "
            "torchvision:MODEL:FILE or timm:MODEL:FILE"
        )
    folder = encoder.absolute().parent
    if (folder / "config.yaml").is_file():
        return EncoderLocation(encoder, folder, folder, _results(folder / "eval", out))
    if folder.parent.name == "checkpoints" and (folder.parents[1] / "config.yaml").is_file():
        run = folder.parents[1]
        results = run / "eval" / ("" if given.absolute() == run else folder.name)
        return EncoderLocation(encoder, run, run, _results(results, out))
    return EncoderLocation(encoder, None, folder, _results(folder / "eval", out))


def _results(folder: Path, out: str | None) -> Path:
    return (Path(out) if out else folder).absolute()


def _find_inside(given: Path) -> Path:
    """Return the encoder file of a run, of a checkpoint, or of the checkpoint that a ``last`` file names.

    A run that was stopped, continued and then killed has its own file from the stop and newer checkpoints.
    """
    if given.is_file():
        return _follow(given)
    own, last = given / _ENCODER_FILE, given / "checkpoints" / "last"
    if not last.is_file():
        return own
    newest = _follow(last)
    is_own_newest = _steps_of(given / "summary.json") >= int(newest.parent.name.removeprefix("step-"))
    return own if own.is_file() and (is_own_newest or not newest.is_file()) else newest


def _follow(last: Path) -> Path:
    """Return the encoder file of the checkpoint that ``last`` names; refuse one outside its folder."""
    name = last.read_text(errors="replace").strip()
    encoder = last.parent / name / _ENCODER_FILE
    if not _CHECKPOINT.fullmatch(name) or not encoder.resolve().is_relative_to(last.parent.resolve()):
        raise UserError(
            f"{last}: names {name!r:.80}; only a checkpoint beside it is followed, give its directory"
        )
    return encoder


def _steps_of(summary: Path) -> int:
    """Return the steps of a finished run; -1 where its summary is missing or damaged."""
    try:
        return int(json.loads(summary.read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def open_frozen(
    location: EncoderLocation,
    *,
    image_size: int | None,
    frames: int | None = None,
    seed: int,
    encoder: Encoder | None = None,
) -> Frozen:
    """Load the encoder.

    Args:
        location: Where it is.
        image_size: Side of the input if another library's network takes any size; None is its default.
        frames: Frames of a clip if another library's network takes any number; None is its default.
        seed: Seed of the weights, if the network is a random one.
        encoder: A fresh network of your own class, if the file holds one. A copy loads the file's weights;
            the network itself is the random encoder that scores are compared with.

    Raises:
        UserError: the encoder cannot be used.
    """
    if isinstance(location.encoder, Foreign):
        return _open_foreign(location.encoder, image_size, frames, seed)
    module, info = load_encoder(location.encoder, copy.deepcopy(encoder))
    size, length = info.input.size, info.input.frames
    if encoder is None:
        build_random: Callable[[], nn.Module] = lambda: build_arch(info.arch, size, length)  # noqa: E731
        head = [info.arch.temporal, *info.arch.temporal_args.values()] if info.arch.temporal else []
        shape = " ".join(map(str, [info.arch.name, *info.arch.args.values(), *head]))
    else:
        build_random, shape = lambda: copy.deepcopy(encoder), f"{info.arch} {tensor_hash(encoder)}"
    return Frozen(
        module,
        build_random,
        shape,
        hashlib.sha256(location.encoder.read_bytes()).hexdigest(),
        info.input,
        {"name": info.arch.name, **info.arch.args, **_clips(info), "image_size": size, **info.extra},
    )


def _clips(info: EncoderInfo) -> dict[str, Any]:
    """Describe the head and the frames of an encoder of clips."""
    arch = info.arch
    head = {"temporal": arch.temporal, "temporal_args": arch.temporal_args} if arch.temporal else {}
    return head | ({"frames": info.input.frames} if info.input.frames > 1 else {})


def _open_foreign(foreign: Foreign, image_size: int | None, frames: int | None, seed: int) -> Frozen:
    with seeded(seed):
        module, spec = load_foreign(foreign, image_size, frames)
    network = module.image_encoder
    assert isinstance(network, LibraryEncoder)
    clips = {"frames": spec.frames} if spec.frames > 1 else {}
    return Frozen(
        module,
        lambda: load_foreign(replace(foreign, weights=RANDOM), spec.size, spec.frames)[0],
        " ".join(map(str, [f"{foreign.arch.name}:random", spec.size, *clips.values()])),
        tensor_hash(network.network),
        spec,
        {"name": str(foreign), **clips, "image_size": spec.size},
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights from ``seed`` inside the block; restore the global generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tensor_hash(module: nn.Module) -> str:
    """Return a SHA-256 of name, type, shape and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""The encoder under test: from ``checkpoint=`` to a network, how it is fed, and what it is compared with."""

import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.config import UserError
from contrastive.encoders.build import build_arch
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.foreign import Foreign, load_foreign, parse_foreign
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import load_encoder

_ENCODER_FILE = "encoder.safetensors"
_CHECKPOINT = re.compile(r"step-\d+")


@dataclass(frozen=True)
class EncoderLocation:
    """Where an encoder is, and what is known of the run it comes from.

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
    """An encoder that is evaluated.

    Attributes:
        module: Views (b, 3, s, s) to features (b, d), in evaluation mode.
        build_random: Another network of the same shape, its weights drawn from torch's global generator.
        shape: What the shape depends on, in words.
        sha256: Of our file, or over the tensors of another library's network.
        input: The images it takes.
        about: What results say of it.
    """

    module: nn.Module
    build_random: Callable[[], nn.Module]
    shape: str
    sha256: str
    input: InputSpec
    about: dict[str, Any]


def resolve(path: str, out: str | None = None) -> EncoderLocation:
    """Find the encoder of a run directory, a checkpoint directory, or take the file or the name itself.

    Results of a run's encoder go to ``<run>/eval``, of one of its checkpoints to ``<run>/eval/step-N``, of
    another library's network to ``runs/<library>-<model>-<weights>/eval``.

    Raises:
        UserError: nothing there, or no encoder in it.
    """
    if (foreign := parse_foreign(path)) is not None:
        home = Path("runs") / foreign.slug
        return EncoderLocation(foreign, None, home, _results(home / "eval", out))
    given = Path(path)
    if not given.exists():
        raise UserError(
            f"checkpoint={path}: does not exist; give a run directory (runs/NAME), a checkpoint directory "
            f"(runs/NAME/checkpoints/step-N), an {_ENCODER_FILE}, or torchvision:MODEL or timm:MODEL"
        )
    encoder = given if given.is_file() and given.name != "last" else _inside(given)
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


def open_frozen(
    location: EncoderLocation, *, image_size: int | None, seed: int, encoder: Encoder | None = None
) -> Frozen:
    """Load the encoder.

    Args:
        location: Where it is.
        image_size: Side of the input where another library's network leaves that open; None is its own.
        seed: Of random weights, should it be made of them.
        encoder: A fresh network of your own class, for a file of one. A copy takes the file's weights; as it
            is, it is the random encoder that scores are compared with.

    Raises:
        UserError: it cannot be used.
    """
    if isinstance(location.encoder, Foreign):
        return _open_foreign(location.encoder, image_size, seed)
    module, info = load_encoder(location.encoder, copy.deepcopy(encoder))
    if encoder is None:
        build_random: Callable[[], nn.Module] = lambda: build_arch(info.arch, info.input.size)  # noqa: E731
        shape = " ".join(map(str, [info.arch.name, *info.arch.args.values()]))
    else:
        build_random, shape = lambda: copy.deepcopy(encoder), f"{info.arch} {tensor_hash(encoder)}"
    return Frozen(
        module,
        build_random,
        shape,
        hashlib.sha256(location.encoder.read_bytes()).hexdigest(),
        info.input,
        {"name": info.arch.name, **info.arch.args, "image_size": info.input.size, **info.extra},
    )


def _open_foreign(foreign: Foreign, image_size: int | None, seed: int) -> Frozen:
    with seeded(seed):
        module, fed = load_foreign(foreign, image_size)
    return Frozen(
        module,
        lambda: build_arch(foreign.arch, fed.size),
        f"{foreign.arch.name}:random {fed.size}",
        tensor_hash(module.network),
        fed,
        {"name": str(foreign), "image_size": fed.size},
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights made meanwhile come from ``seed``; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tensor_hash(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every parameter and buffer, batch statistics included."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Read and write encoder files (``encoder.safetensors``), and read weights that torchvision or timm wrote."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive.config import DataConfig, UserError, first_line
from contrastive.encoders.build import build_arch, without_memory
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.spec import OWN, ArchSpec, InputSpec, numbers
from contrastive.encoders.temporal import TEMPORAL_HEAD
from contrastive.registry import ENCODERS, encoder_key
from memory_bank import sealed

logger = logging.getLogger(__name__)

FORMAT = "contrastive-encoder"
FORMAT_VERSION = 3
"""Version 3 describes network and input as JSON; 2 has one entry per value (name, width, stem, ...); both are
sealed (see sealed.py). 1 has the content of 2 or 3 and need not be sealed, e.g. if another tool saved it."""

_PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Suffixes of files that ``torch.save`` writes."""


@dataclass(frozen=True)
class EncoderInfo:
    """The metadata of an encoder file.

    Attributes:
        arch: The network.
        input: The images it expects.
        extra: Further metadata.
    """

    arch: ArchSpec
    input: InputSpec
    extra: dict[str, str]


def save_encoder(path: Path, encoder: Encoder, input: InputSpec, extra: Mapping[str, str]) -> None:
    """Write ``encoder`` atomically, with metadata that describes the network and its input.

    Args:
        path: ``.../encoder.safetensors``; replaced if it exists.
        encoder: Its tensors are written under their own names.
        input: The images it was trained on.
        extra: More metadata, such as the step; must not reuse the names written here.

    Raises:
        ValueError: ``extra`` reuses a name.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "arch": encoder.spec.to_json(),
        "input": input.to_json(),
    }
    if reused := sorted({*metadata, sealed.SEAL} & {*extra}):
        raise ValueError(f"extra={reused}: these names are taken; allowed is any but {', '.join(metadata)}")
    sealed.write(path, encoder.state_dict(), metadata | dict(extra))


def load_encoder(path: str | Path, encoder: Encoder | None = None) -> tuple[Encoder, EncoderInfo]:
    """Load the encoder of an ``encoder.safetensors``, on the CPU, in evaluation mode, and its description.

    ``encoder(center_view(images, info.input.data))`` are then the features of images that
    ``contrastive.data.decode.read_file(path, info.input.decode_size, info.input.white)`` reads.

    Args:
        path: The file.
        encoder: Network to load the weights into, in place; needed for a network class of your own, since
            no code that a file names is imported. None builds the network that the file describes.

    Raises:
        UserError: no such file, a damaged file, a file of another program or of a later version, a network
            that this release cannot build, or tensors that do not fit the network.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    info = _parse_info(path, metadata)
    if encoder is None:
        encoder = _build_for(info, tensors, path)
    else:
        _require_fit(encoder, tensors, path)
    encoder.load_state_dict(tensors)
    return encoder.eval(), info


def read_info(path: Path) -> EncoderInfo:
    """Read the metadata of an ``encoder.safetensors``.

    Raises:
        UserError: see ``load_encoder``.
    """
    return _parse_info(path, _read(path)[1])


def described_network(weights: str | None) -> ArchSpec | None:
    """Return the network that weights are of, if they are an ``encoder.safetensors``, which says it.

    Args:
        weights: A value of ``encoder.weights``.

    Returns:
        None for all others: names, files of other programs, and what cannot be read.
    """
    path = Path(weights or "")
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    _, metadata = _read(path)
    return _parse_info(path, metadata).arch if metadata.get("format") == FORMAT else None


def _build_for(info: EncoderInfo, tensors: Mapping[str, Tensor], path: Path) -> Encoder:
    """Build the network that a file describes, after checking the shapes of the file's tensors."""
    if info.arch.is_own:
        name = info.arch.name.removeprefix(OWN)
        raise UserError(
            f"{path}: is of a class of your own, {name}, which a file cannot build; pass it in Python: "
            f"load_encoder(path, encoder={name}()) or evaluate(protocol, config, encoder={name}())"
        )
    if encoder_key(info.arch.name) not in ENCODERS:
        raise UserError(
            f"{path}: is of a network {info.arch.name!r:.80} that this release does not have; upgrade, or "
            "register it in contrastive/registry.py"
        )
    try:
        # A file may claim any width, so build it without memory first.
        outline = without_memory(lambda: build_arch(info.arch, info.input.size, info.input.frames))
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{path}: damaged metadata ({info.arch}: {first_line(error)}); export the encoder again"
        ) from error
    _require_fit(outline, tensors, path)
    with torch.random.fork_rng(devices=[]):
        return build_arch(info.arch, info.input.size, info.input.frames)


def load_weights(encoder: Encoder, weights: str) -> None:
    """Load published weights into ``encoder``, or a file of torchvision, timm, or ``save_encoder``.

    Of an encoder under a temporal head, weights without a head go into the part that encodes single frames,
    and the head keeps its own.

    Args:
        encoder: Changed in place; unchanged if the tensors do not fit. The file's classifier is left out.
        weights: One of ``encoder.weight_names``; or a file for ``read_tensors``, with names that may have a
            prefix, see ``fit_names``.

    Raises:
        UserError: the weights cannot be used; the message has the first key that does not fit, and a remedy.
    """
    names = encoder.weight_names
    if weights in names:
        encoder = encoder.image_encoder
        tensors = encoder.published_weights(weights)
    elif Path(weights).is_file() or (not names and weights != "default"):
        tensors = read_tensors(Path(weights))
        if not any(f".{TEMPORAL_HEAD}." in f".{name}" for name in tensors):
            encoder = encoder.image_encoder
    else:
        raise UserError(
            f"{encoder.spec.name}: weights {weights!r} are neither a name nor a file; allowed are "
            f"{', '.join([*names, 'a file of tensors'])}" + ("" if names else _WITH_WEIGHTS)
        )
    settings = _library_remedy if ":" in encoder.spec.name else _remedy

    def remedy(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
        return _name_closest(encoder, wanted, tensors) + settings(wanted, tensors)

    encoder.load_state_dict(
        fit_names(encoder.state_dict(), tensors, encoder.classifier_names, weights, remedy)
    )


_WITH_WEIGHTS = (
    "; published weights are those of vit_tiny, vit_small, vit_base, convnext_tiny, torchvision:MODEL and "
    "timm:MODEL"
)


def _name_closest(encoder: Encoder, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Name the network of the registry that a file mostly fits, if it fits ``encoder`` less; else ""."""
    if encoder.image_encoder is not encoder:
        return ""  # the file has a head, another one than is wanted
    shares = {encoder.spec.name: _fitting_share(wanted, tensors)}
    for name in ENCODERS:
        if not name.endswith(":") and name != encoder.spec.name:
            outline = without_memory(partial(build_arch, ArchSpec(name), _USUAL_SIZE))
            shares[name] = _fitting_share(outline.state_dict(), tensors)
    closest = max(shares, key=lambda name: shares[name])
    if closest == encoder.spec.name or shares[closest] < 0.5:
        return ""
    return f"the file is closest to encoder.name={closest}; "


_USUAL_SIZE = 224
"""Image size of most published weights."""


def _fitting_share(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the share of the names of either side that both have in the same shape."""
    fitting = sum(wanted[name].shape == tensors[name].shape for name in wanted.keys() & tensors.keys())
    return fitting / len(wanted.keys() | tensors.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.tar`` or ``.ckpt`` file.

    Keys of nested dictionaries are joined by dots: ``state_dict.conv1.weight``.

    Raises:
        UserError: the file cannot be read, needs more than torch's restricted unpickler, or has no tensors.
    """
    return _read(path)[0] if path.suffix == ".safetensors" else _read_pickle(path)


def fit_names(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    classifier_names: Sequence[str],
    source: str,
    remedy: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], str],
) -> dict[str, Tensor]:
    """Rename the tensors of a file to the names of the network, by removing a prefix that they share.

    Args:
        wanted: State of the network; the file must have each of its names, in the same shape.
        tensors: Tensors by the file's names, e.g. ``state_dict.module.encoder_q.conv1.weight``.
        classifier_names: Names of the classifier, which is left out.
        source: The file, for messages.
        remedy: Returns the advice if nothing fits, from ``wanted`` and the tensors that come closest.

    Raises:
        UserError: none or several prefixes fit, or a tensor is not finite.
    """
    anchor = next(iter(wanted))
    ends = [name for name in tensors if name.endswith(f".{anchor}")]
    prefixes = ["", *(name.removesuffix(anchor) for name in ends)]
    bodies = {prefix: _below(prefix, tensors, classifier_names, wanted) for prefix in prefixes}
    fitting = [prefix for prefix, body in bodies.items() if not _misfit(wanted, body)]
    chosen = [prefix for prefix in fitting if not _SECOND.search(prefix)] if len(fitting) > 1 else fitting
    if not fitting:
        closest = max(prefixes, key=lambda prefix: len(wanted.keys() & bodies[prefix].keys()))
        place = f" (below {closest!r})" if closest else _describe_names(wanted, tensors)
        reason = f"{_misfit(wanted, bodies[closest])}{place}; {remedy(wanted, bodies[closest])}"
        raise UserError(f"{source}: {reason}")
    if len(chosen) != 1:
        raise UserError(f"{source}: tensors below each of {', '.join(fitting)} fit; save one of them alone")
    [prefix] = chosen
    if prefix:
        others = sum(not name.startswith(prefix) for name in tensors)
        logger.info("%s: took the tensors below %r; %d others are left out", source, prefix, others)
    for name, tensor in bodies[prefix].items():
        plain = tensor.layout == torch.strided and not tensor.is_meta
        if not plain or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UserError(
                f"{source}: {prefix}{name} is a {tensor.dtype} tensor, {tensor.layout}, on {tensor.device}; "
                "dense real numbers are needed"
            )
        if not tensor.float().isfinite().all():
            raise UserError(f"{source}: {prefix}{name} holds numbers that are not finite; take another file")
    return bodies[prefix]


_SECOND = re.compile("encoder_k|momentum|student|target|(^|[._])ema[._]")
"""Matches the second of two copies of a network in a file: MoCo, BYOL, DINO (scored by its teacher), EMA."""


def _below(
    prefix: str, tensors: Mapping[str, Tensor], classifier_names: Sequence[str], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors below ``prefix``, without it in their names, except the classifier."""
    body = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    cut = tuple(f"{name}." for name in classifier_names)
    body = {name: value for name, value in body.items() if not name.startswith(cut)}
    # Batch counters are missing in files of old torchvision releases, and have no effect here.
    counters = {name: value for name, value in wanted.items() if name.endswith(".num_batches_tracked")}
    return counters | body


def _misfit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Describe the first name or shape of ``tensors`` that differs from ``wanted``; empty if none does."""
    for name in [*wanted, *tensors]:
        if name not in tensors:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is not in the network"
        if wanted[name].shape != tensors[name].shape:
            return f"{name} is {list(tensors[name].shape)}, the network has {list(wanted[name].shape)}"
    return ""


def _describe_names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Describe the common prefix of a file's names, or its keys; empty if it has names of the network."""
    if not tensors or wanted.keys() & tensors.keys():
        return ""
    pairs = zip(min(tensors).split("."), max(tensors).split("."), strict=False)
    common = ".".join(first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    keys = dict.fromkeys(name.partition(".")[0] for name in tensors)
    return f" (all names begin with {common}.)" if common else f" (it holds {', '.join([*keys][:6])})"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return sealed.read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an encoder.safetensors") from error
    except sealed.FormatError as error:
        raise UserError(f"{error}; download or write it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``torch.save`` file, only by torch's restricted unpickler."""
    if path.exists() and path.suffix not in _PICKLES:
        raise UserError(f"{path}: allowed are files in .safetensors, {', '.join(_PICKLES)}")
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # on garbage the unpickler raises a dozen types; all mean the same here
        reason = first_line(error)
        raise UserError(
            f"{path}: not a file of tensors ({reason}); save model.state_dict() instead"
        ) from error
    tensors = _flat(body)
    if not tensors:
        holds = (
            f" (it holds {', '.join(map(str, list(body)[:6]))})" if isinstance(body, dict) and body else ""
        )
        raise UserError(f"{path}: a state dict is needed, names to tensors{holds}; save model.state_dict()")
    return tensors


def _flat(body: Any, prefix: str = "", depth: int = 3) -> dict[str, Tensor]:
    """Flatten nested dictionaries of tensors, with keys joined by dots; ignore everything else."""
    tensors: dict[str, Tensor] = {}
    for key, value in body.items() if isinstance(body, dict) else ():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif depth:
            tensors |= _flat(value, f"{prefix}{key}.", depth - 1)
    return tensors


def _require_fit(encoder: Encoder, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = encoder.state_dict()
    if misfit := _misfit(wanted, tensors):
        raise UserError(f"{path}: {misfit}; {_remedy(wanted, tensors)}")


def _remedy(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    return _stem_remedy(wanted, tensors) or (
        "encoder.name, encoder.width and encoder.args (of a transformer data.image_size too) must be those "
        "the file was made with"
    )


def _library_remedy(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    return (
        "MODEL in encoder.name=LIBRARY:MODEL or checkpoint=LIBRARY:MODEL:FILE (of a transformer encoder.args "
        "and data.image_size too) must be the one the file was made with; where that had the stem for small "
        "images, give the run that it was exported from"
    )


def _stem_remedy(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Advise on ``encoder.stem`` if the first convolutions differ in kernel size; else return ""."""
    kernels = [side["conv1.weight"].shape[2:] for side in (wanted, tensors) if "conv1.weight" in side]
    if len(kernels) < 2 or kernels[0] == kernels[1] or len(kernels[1]) != 2:
        return ""
    stem = {7: "imagenet", 3: "small"}.get(kernels[1][0])
    if stem is None:
        return "a 7x7 or 3x3 kernel is needed"
    return f"the network's kernel is {kernels[0][0]}x{kernels[0][1]}; set encoder.stem={stem}"


def _parse_info(path: Path, metadata: dict[str, str]) -> EncoderInfo:
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: not an encoder of contrastive-pretrain (format={metadata.get('format')!r:.80}); "
            "to train from weights of torchvision or timm set encoder.weights, to evaluate them give "
            "checkpoint=torchvision:MODEL:FILE or timm:MODEL:FILE"
        )
    rest = {name: value for name, value in metadata.items() if name != "format"}
    try:
        version = int(rest.pop("format_version"))
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {version}, this release reads up to {FORMAT_VERSION}; upgrade"
            )
        if rest.pop(sealed.SEAL, None) is None and version >= 2:
            raise UserError(f"{path}: damaged metadata (no {sealed.SEAL}); export the encoder again")
        if version >= 3 or "arch" in rest:
            arch, input = ArchSpec.from_json(rest.pop("arch")), InputSpec.from_json(rest.pop("input"))
        else:
            arch, input = _pop_version_2(rest)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged metadata ({error}); export the encoder again") from error
    return EncoderInfo(arch, input, rest)


def _pop_version_2(metadata: dict[str, str]) -> tuple[ArchSpec, InputSpec]:
    """Pop the description of versions 1 and 2, one entry per value, from ``metadata``."""
    args = {"width": int(metadata.pop("width")), "stem": metadata.pop("stem")}
    data = DataConfig(
        image_size=int(metadata.pop("image_size")),
        decode_size=int(metadata.pop("decode_size")),
        mean=numbers(json.loads(metadata.pop("mean"))),
        std=numbers(json.loads(metadata.pop("std"))),
    )
    return ArchSpec(metadata.pop("name"), args), InputSpec.of(data)

"""Networks of torchvision and timm as feature extractors, with their weights, a file's, or random ones."""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.config import DataConfig, UserError, check_path
from contrastive.encoders.weights import fit_names, read_tensors

RANDOM = "random"


@dataclass(frozen=True)
class Foreign:
    """A network of another library, spelt ``LIBRARY:MODEL[:WEIGHTS]``.

    Attributes:
        library: ``torchvision`` or ``timm``.
        model: A classifier of it; timm's may carry a tag (``resnet18.a1_in1k``).
        weights: ``random``; a file of tensors; of torchvision also one of its names (``IMAGENET1K_V2``).
            Empty takes the library's default, which it downloads once.
    """

    library: str
    model: str
    weights: str = ""

    def __str__(self) -> str:
        """As the user spells it."""
        return ":".join(filter(None, (self.library, self.model, self.weights)))

    @property
    def slug(self) -> str:
        """Name of a folder for what is measured with it, e.g. ``torchvision-resnet18-random``."""
        return "-".join(filter(None, (self.library, self.model, Path(self.weights).stem)))


@dataclass(frozen=True)
class Feed:
    """How an encoder wants its images.

    Attributes:
        image_size: Side in pixels of its input.
        decode_size: Side of the square that is cut from.
        mean: Per-channel mean to normalise with, in [0, 1] units.
        std: Likewise the standard deviation.
    """

    image_size: int
    decode_size: int
    mean: list[float]
    std: list[float]


def parse_foreign(text: str) -> Foreign | None:
    """``text`` taken apart; None where it names no other library, so that it is a path.

    Raises:
        UserError: the model is missing.
    """
    library, colon, rest = text.partition(":")
    if library not in LIBRARIES or not colon:
        return None
    model, _, weights = rest.partition(":")
    if not model:
        raise UserError(f"{text!r}: names no model; write {library}:resnet18 or {library}:resnet18:random")
    return Foreign(library, model, weights)


def load_foreign(spec: Foreign, image_size: int | None) -> tuple[nn.Module, Feed]:
    """The network without its classifier, in evaluation mode, views (b, 3, s, s) to (b, d), and its feed.

    Args:
        spec: What to load; random weights are drawn from torch's global generator.
        image_size: Side of its input; None takes what its default weights were trained at.

    Raises:
        UserError: no such model, no such weights, a download that failed, a file that does not fit, or timm
            is not installed; or images of this size are not for it.
    """
    if image_size is None:
        module, feed = LIBRARIES[spec.library](spec, image_size)
        return module.eval(), feed
    try:
        module, feed = LIBRARIES[spec.library](spec, image_size)
        with torch.no_grad():
            module.eval()(torch.zeros(2, 3, image_size, image_size))
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # each network refuses in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{spec}: does not take images of {image_size} px ({reason}); leave data.image_size out to take "
            "the size it was made for, or choose another model"
        ) from error
    return module, feed


def _torchvision(spec: Foreign, image_size: int | None) -> tuple[nn.Module, Feed]:
    models = importlib.import_module("torchvision.models")
    _check_model(spec, models.list_models(module=models))
    named = models.get_model_weights(spec.model)
    chosen = named.DEFAULT if not spec.weights else named.__members__.get(spec.weights)
    module = models.get_model(spec.model, weights=None)
    if chosen is None and image_size is not None and isinstance(module, models.VisionTransformer):
        module = models.get_model(spec.model, weights=None, image_size=image_size)  # its positions are of one
    head = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)][-1:]
    if not head:
        raise UserError(
            f"{spec}: ends in no linear layer, so its features are not known; choose another model"
        )
    module.set_submodule(head[0], nn.Identity())
    if chosen is not None:
        tensors = _download(spec, lambda: chosen.get_state_dict(check_hash=True, weights_only=True))
        _fill(module, tensors, head[0], str(spec))
    elif spec.weights != RANDOM:
        _fill(module, _read(spec, [item.name for item in named]), head[0], spec.weights)
    preset = (chosen or named.DEFAULT).transforms()
    own = Feed(preset.crop_size[0], preset.resize_size[0], list(preset.mean), list(preset.std))
    return module, _feed(own, image_size)


def _timm(spec: Foreign, image_size: int | None) -> tuple[nn.Module, Feed]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"{spec}: needs timm: pip install 'contrastive-pretrain[timm]'") from error
    if not timm.is_model(spec.model):
        _check_model(spec, timm.list_models())
    module = timm.create_model(spec.model, num_classes=0)
    config = module.pretrained_cfg
    side = config["input_size"][-1]
    if image_size not in (None, side) and hasattr(module, "patch_embed"):  # its positions depend on the size
        module = timm.create_model(spec.model, num_classes=0, img_size=image_size)
    if not spec.weights:
        same = {"img_size": image_size} if image_size and hasattr(module, "patch_embed") else {}
        module = _download(
            spec, lambda: timm.create_model(spec.model, num_classes=0, pretrained=True, **same)
        )
    elif spec.weights != RANDOM:
        _fill(module, _read(spec), config["classifier"], spec.weights)
    decode_size = int(side / config["crop_pct"])
    own = Feed(side, decode_size, list(config["mean"]), list(config["std"]))
    return module, _feed(own, image_size)


LIBRARIES: dict[str, Callable[[Foreign, int | None], tuple[nn.Module, Feed]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
}


def _feed(own: Feed, image_size: int | None) -> Feed:
    if image_size in (None, own.image_size):
        return own
    data = DataConfig(image_size=image_size, mean=own.mean, std=own.std)
    return Feed(data.image_size, data.stored_size, data.mean, data.std)


def _check_model(spec: Foreign, names: list[str]) -> None:
    if spec.model in names:
        return
    close = difflib.get_close_matches(spec.model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"{spec}: {spec.library} has no classifier {spec.model!r}; {hint}allowed are the {len(names)} names "
        f"of {spec.library}'s list_models(), e.g. resnet18 and resnet50"
    )


def _read(spec: Foreign, names: list[str] | None = None) -> dict[str, Tensor]:
    path = Path(check_path(f"{spec.library}:{spec.model}:FILE", spec.weights))
    if not path.is_file():
        allowed = ", ".join([RANDOM, *(names or []), "a file of tensors"])
        raise UserError(
            f"{spec}: weights {spec.weights!r} are neither a name nor a file; allowed are {allowed}"
        )
    return read_tensors(path)


def _download(spec: Foreign, fetch: Callable[[], Any]) -> Any:
    """What ``fetch`` returns; libraries raise a dozen kinds, all of which mean that it is not to be had."""
    try:
        return fetch()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{spec}: its weights could not be downloaded ({reason}); give a file, "
            f"{spec.library}:{spec.model}:FILE, or {spec.library}:{spec.model}:{RANDOM}"
        ) from error


def _fill(
    module: nn.Module, tensors: dict[str, Tensor], classifier: str | tuple[str, ...], source: str
) -> None:
    """Load ``tensors``, the classifier's left out; nothing of the network may be missing."""
    heads = (classifier,) if isinstance(classifier, str) else classifier
    remedy = (
        "MODEL in LIBRARY:MODEL:FILE (of a transformer data.image_size too) must be the one the file was "
        "made with; where that had the stem for small images, give the run that it was exported from"
    )
    module.load_state_dict(fit_names(module.state_dict(), tensors, heads, source, lambda *_: remedy))

"""Wrap networks of other libraries as encoders, with the library's own parameter names."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.config import UserError, first_line
from contrastive.config_files import nearest
from contrastive.encoders.encoder import Encoder

DEFAULT = "default"
"""Name of the weights that a library uses by default."""


class LibraryEncoder(Encoder):
    """Wraps a network of another library that returns pooled features.

    The state dict has the network's own keys, so that files can be exchanged with that library.

    Args:
        network: Network without its classifier: (b, 3, s, s), of clips (b, 3, t, s, s), to (b, d).
        name: The ``encoder.name``, for messages.
        image_size: Side s of its input.
        args: The ``encoder.args`` it was built with, for messages.
        classifier_names: Names of its classifier in weight files.
        frames: Frames t of a clip; None for a network of images.

    Raises:
        UserError: the network does not accept images or clips of this size.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        image_size: int,
        args: dict[str, Any],
        classifier_names: Sequence[str],
        frames: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.name, self.classifier_names = network, name, tuple(classifier_names)
        self.dim = _pooled_dim(network, name, image_size, args, frames)
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute only the pooled features."""
        features: Tensor = self.network(x)
        return features


_PREFIX = "network."


def _strip_prefix(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in tensors if name.startswith(prefix + _PREFIX)]:
        tensors[prefix + name.removeprefix(prefix + _PREFIX)] = tensors.pop(name)


def _add_prefix(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[prefix + _PREFIX + name.removeprefix(prefix)] = tensors.pop(name)


@torch.no_grad()
def _pooled_dim(
    network: nn.Module, name: str, image_size: int, args: dict[str, Any], frames: int | None
) -> int:
    """Measure the size of the pooled features with one image or clip of zeros."""
    device = next(network.parameters()).device
    network.eval()
    clip = () if frames is None else (frames,)
    with explain_refusal(name, args, image_size, frames):
        features = network(torch.zeros(1, 3, *clip, image_size, image_size, device=device))
    network.train()
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(
            f"{name}: returns no vector for each image; leave encoder.args.global_pool out, or choose "
            "another model"
        )
    return features.shape[1]


@contextmanager
def explain_refusal(
    name: str, args: dict[str, Any], image_size: int, frames: int | None = None
) -> Iterator[None]:
    """Turn a library's error for wrong arguments or sizes into a UserError."""
    what, choose = f"images of {image_size} px", "data.image_size"
    if frames is not None:
        what, choose = f"clips of {frames} frames of {image_size} px", "data.image_size or data.frames"
    try:
        yield
    except (UserError, NotImplementedError):  # NotImplementedError: cannot be built on the meta device
        raise
    except Exception as error:  # of any type: each network raises its own
        if "memory" in str(error):
            raise
        if args:
            raise UserError(
                f"{name} with encoder.args={args}: does not work for {what} "
                f"({type(error).__name__}: {first_line(error)}); change or leave out the argument, or choose "
                f"another {choose}"
            ) from error
        raise UserError(
            f"{name}: does not take {what} ({first_line(error)}); leave {choose} "
            "out to take the size it was made for, choose another size, or another model"
        ) from error


def check_arguments(name: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    """Refuse arguments that a network does not have; suggest the nearest one."""
    for argument in given:
        if argument not in allowed:
            raise UserError(
                f"encoder.args.{argument}: {name} has no such argument; {nearest(argument, allowed)}"
            )


def check_model(library: str, model: str, names: Sequence[str]) -> None:
    """Refuse a model that a library does not have; suggest the nearest ones."""
    if model in names:
        return
    if not model:
        raise UserError(f"'{library}:': names no model; write {library}:resnet18")
    close = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"{library}:{model}: {library} has no classifier {model!r}; {hint}allowed are the {len(names)} names "
        f"of {library}'s list_models(), e.g. resnet18 and resnet50"
    )


def download(name: str, fetch: Callable[[], Any]) -> Any:
    """Run ``fetch``; turn any download error, and weights that do not fit, into a UserError."""
    try:
        return fetch()
    except Exception as error:
        if "loading state_dict" in str(error):
            raise UserError(
                f"{name}: its published weights do not fit data.image_size and encoder.args "
                f"({str(error).splitlines()[-1].strip()}); leave out what changes the network, or set "
                "encoder.weights=null"
            ) from error
        raise UserError(
            f"{name}: its weights could not be downloaded ({first_line(error)}); to train, give a file "
            f"(encoder.weights=FILE) or begin from random ones (encoder.weights=null); to evaluate, give "
            f"{name}:FILE or {name}:random"
        ) from error

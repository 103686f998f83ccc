"""Load networks of torchvision and timm by name, with published weights, a file's, or random ones."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from contrastive.config import UserError, check_path
from contrastive.encoders.build import build_arch, under_head
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.library import DEFAULT
from contrastive.encoders.spec import ArchSpec, InputSpec
from contrastive.encoders.weights import load_weights
from contrastive.registry import ENCODERS, encoder_key

RANDOM = "random"


@dataclass(frozen=True)
class Foreign:
    """A network of another library, spelt ``LIBRARY:MODEL[:WEIGHTS]``.

    Attributes:
        library: ``torchvision`` or ``timm``.
        model: A classifier of it; timm's may carry a tag (``resnet18.a1_in1k``).
        weights: ``random``; a file of tensors; for torchvision also one of its names (``IMAGENET1K_V2``).
            Empty takes the library's default, which it downloads once.
    """

    library: str
    model: str
    weights: str = ""

    def __str__(self) -> str:
        """Return the text that the user wrote."""
        return ":".join(filter(None, (self.library, self.model, self.weights)))

    @property
    def slug(self) -> str:
        """Return a folder name for its results, e.g. ``torchvision-resnet18-random``."""
        return "-".join(filter(None, (self.library, self.model, Path(self.weights).stem)))

    @property
    def arch(self) -> ArchSpec:
        """Describe the network without its weights."""
        return ArchSpec(f"{self.library}:{self.model}")


def parse_foreign(text: str) -> Foreign | None:
    """Parse ``text``; return None if it does not start with a library's name, so that it is a path.

    Raises:
        UserError: the model is missing.
    """
    key = encoder_key(text)
    if key not in ENCODERS or not key.endswith(":"):
        return None
    library, _, rest = text.partition(":")
    model, _, weights = rest.partition(":")
    if not model:
        raise UserError(f"{text!r}: names no model; write {library}:resnet18 or {library}:resnet18:random")
    return Foreign(library, model, weights)


def load_foreign(
    foreign: Foreign, image_size: int | None, frames: int | None = None
) -> tuple[Encoder, InputSpec]:
    """Load a network without its classifier, in evaluation mode, and describe its input.

    Args:
        foreign: Network to load; random weights are drawn from torch's global generator.
        image_size: Side of its input; None takes the size at which its weights were trained.
        frames: Frames of a clip; None takes that of its weights: 1 for networks of images, which are averaged
            over the frames of a clip.

    Raises:
        UserError: no such model or weights, a failed download, a file that does not fit, or an image size
            that the network does not accept.
    """
    library = import_module(ENCODERS[f"{foreign.library}:"].partition(":")[0])
    published: InputSpec = library.input_spec(foreign.model, foreign.weights or DEFAULT)
    length = frames or published.frames
    encoder = build_arch(foreign.arch, image_size or published.size, length)
    if length > 1 and not encoder.takes_clips:
        encoder = under_head(encoder, "mean", {})
    if foreign.weights != RANDOM:
        weights = foreign.weights or DEFAULT
        load_weights(encoder, check_path(f"{foreign.arch.name}:FILE", weights))
    encoder.eval()
    return encoder, replace(published.at(image_size), frames=length)

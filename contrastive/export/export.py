"""Export the encoder of a checkpoint to a file, verify that it computes the same, and write a model card."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contrastive.config import UserError
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.weights import load_encoder
from contrastive.export.card import card_of, write_card
from contrastive.export.config import ExportConfig
from contrastive.export.embeddings import write_embeddings
from contrastive.export.graph import write_onnx
from contrastive.export.networks import write_timm, write_torchvision
from contrastive.export.source import ExportedEncoder
from eval.frozen import resolve
from memory_bank.replacing import check_folder

WRITERS: dict[str, Callable[[ExportConfig, ExportedEncoder, Path], dict[str, Any]]] = {
    "torchvision": write_torchvision,
    "timm": write_timm,
    "onnx": write_onnx,
    "embeddings": write_embeddings,
}
"""Functions that write the file, verify it, and return facts for the card and the result."""


def export(config: ExportConfig, *, encoder: Encoder | None = None) -> dict[str, Any]:
    """Write ``config.out`` and its card; return the result for stdout.

    Args:
        config: Settings of the export.
        encoder: A network of your own class, if the checkpoint is of one; see ``load_encoder``.

    Raises:
        UserError: no encoder, a format that does not support its network, a missing package, an output that
            cannot be written, or an output that is the encoder's own file.
    """
    checkpoint = resolve(config.checkpoint)
    file = checkpoint.encoder
    if not isinstance(file, Path):
        raise UserError(
            f"checkpoint={config.checkpoint}: is another library's already; give a run directory, "
            "a checkpoint directory or an encoder.safetensors"
        )
    encoder, info = load_encoder(file, encoder)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    source = ExportedEncoder(encoder, info.arch, info.input, file, sha256, checkpoint.run)
    out = Path(config.out)
    if out.resolve() == file.resolve():
        raise UserError(f"out={config.out}: is the encoder itself; give another name")
    try:
        check_folder(out.parent)
        for path in (out, card_of(out)):
            if path.is_dir():
                raise UserError(f"out={config.out}: {path} is a folder; move it away, or give another name")
        facts = WRITERS[config.format](config, source, out)
        card = write_card(config, source, out, facts)
    except OSError as error:
        raise UserError(f"out={config.out}: cannot be written ({error.strerror or error})") from error
    return {
        "format": config.format,
        "file": str(out),
        "bytes": out.stat().st_size,
        "card": str(card),
        "encoder": str(source.file),
        "encoder_sha256": sha256,
        "dim": encoder.dim,
        **{name: value for name, value in facts.items() if name != "load"},
    }

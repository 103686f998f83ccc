"""``contrastive-export``: export the encoder. Heavy imports come after the config is checked."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from contrastive.config import UserError
from contrastive.config_files import load_config
from contrastive.console import log_to_stderr, print_result
from contrastive.export.config import SUFFIXES, ExportConfig

USAGE = """\
usage: contrastive-export checkpoint=PATH format=FORMAT out=FILE [key=value ...]

Writes the encoder, or its features of a data set, and beside it a model card (FILE.md).
PATH is a run directory, a checkpoint directory, or an encoder.safetensors.

  format=torchvision  state dict for torchvision.models        out=encoder.pth or .safetensors
  format=timm         state dict for timm.create_model         out=encoder.safetensors or .pth
  format=onnx         graph from pixels in [0, 1] to features  out=encoder.onnx
  format=embeddings   features, ids and file paths of images   out=images.npz or .parquet

  key=value  of embeddings: part=test, data.name=images data.root=photos, batch_size=512, device=cpu

State dicts and graphs are loaded again and compared with the encoder before the command ends. The last line
of stdout is one JSON object. Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of the program.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    log_to_stderr()
    if not given:
        print(USAGE, file=sys.stderr)
    try:
        if {"--help", "-h"} & {*given}:
            print_result(USAGE.rstrip())
        else:
            print_result(json.dumps(_export(load_config(ExportConfig, "export", "export", given))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


def _export(config: ExportConfig) -> dict[str, Any]:
    assert config.format in SUFFIXES
    from contrastive.export.export import export

    return export(config)


if __name__ == "__main__":
    sys.exit(main())

"""Export the encoder as an ONNX graph from pixels in [0, 1] to features."""

import contextlib
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.config import UserError
from contrastive.export.config import ExportConfig
from contrastive.export.source import ExportedEncoder
from memory_bank.replacing import replacing

_OPSET = 18
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Graph(nn.Module):
    """Normalisation and encoder in one graph, since wrong normalisation is a usual error of deployments."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: ExportedEncoder) -> None:
        super().__init__()
        self.encoder = source.encoder
        self.register_buffer("mean", torch.tensor(source.input.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(source.input.std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.encoder((pixels - self.mean) / self.std)
        return features


def write_onnx(config: ExportConfig, source: ExportedEncoder, out: Path) -> dict[str, Any]:
    """Write one file, weights included; input ``pixels`` (b, 3, s, s), or (b, t, 3, s, s); any b."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"format=onnx: {', '.join(missing)} not installed; run pip install 'contrastive-pretrain[onnx]'"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        _trace(source, partial)
        difference = source.compare(lambda pixels: _run(partial, pixels))
    lines = [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({out.name!r})",
        'features = session.run(None, {"pixels": pixels})[0]  # float32 in [0, 1], '
        f"(b, {'t, ' * (source.input.frames > 1)}3, s, s)",
    ]
    return {"max_difference": difference, "load": lines}


def _trace(source: ExportedEncoder, path: Path) -> None:
    # The exporter prints to stdout, which is for results, and warns of its own use of deprecated functions.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Graph(source).eval(),
            (torch.rand(2, *source.shape),),
            str(path),
            input_names=["pixels"],
            output_names=["features"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _run(path: Path, pixels: Tensor) -> Tensor:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

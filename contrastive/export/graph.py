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

from contrastive.augment.views import center_of
from contrastive.config import WHITE, UserError
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
    return {"max_difference": difference, "load": _lines(source, out)}


def _lines(source: ExportedEncoder, out: Path) -> list[str]:
    """Return the Python code from image files, or the frames of a clip, to features, without this package."""
    fed = source.input
    stack = 'np.stack([read(path) for path in ["photo.jpg"]])'
    if fed.frames > 1:
        stack = f'np.stack([read(f"{{number}}.jpg") for number in range({fed.frames})])[None]  # a clip'
    return [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        f"def read(path):  # float32 (3, {fed.size}, {fed.size}) in [0, 1]; the graph normalises it",
        "    image = Image.open(path)",
        f"    image.draft(None, ({2 * fed.decode_size}, {2 * fed.decode_size}))  # large JPEG files: smaller",
        "    image = ImageOps.exif_transpose(image)",
        f'    if image.mode.startswith(("I", "F")):  # 16-bit grey, of which {fed.white} is white',
        "        values = np.asarray(image).astype(float)",
        f'        if image.mode == "F" or values.min() < 0 or values.max() > {WHITE}:',
        '            raise ValueError(f"{path}: 32-bit pixels have no agreed range; save it with 16 bits")',
        f"        values = 255 * np.minimum(values, {fed.white}) / {fed.white}",
        "        image = Image.fromarray(values.round().astype(np.uint8))",
        '    image = image.convert("RGBA")  # transparency is seen on white',
        '    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")',
        *(f"    image = {step}" for step in _cut(fed.decode_size, fed.size)),
        "    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255",
        "",
        f"session = onnxruntime.InferenceSession({out.name!r})",
        f"pixels = {stack}",
        f'features = session.run(None, {{"pixels": pixels}})[0]  # (b, {source.encoder.dim})',
    ]


def _cut(stored: int, size: int) -> list[str]:
    """Return the steps from an RGB image to its centre view, those of ``center_view``."""
    steps = [f"ImageOps.fit(image, ({stored}, {stored}), Image.Resampling.BILINEAR)  # the centre square"]
    start, end = center_of(stored, size)
    if end - start < stored:
        steps.append(f"image.crop(({start}, {start}, {end}, {end}))")
    if end - start != size:
        steps.append(f"image.resize(({size}, {size}), Image.Resampling.BILINEAR)")
    return steps


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

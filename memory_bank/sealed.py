"""Read and write safetensors files with a checksum: atomic, equal bytes for equal contents, damage detected.

The format (https://huggingface.co/docs/safetensors) is a JSON header before little-endian tensors. Nothing
in it is ever executed, but it has no checksum, and a weight with a flipped bit is a valid weight. So the
metadata of each file contain a seal: the SHA-256 of the whole file with the seal's own 64 digits zero.

The ``safetensors`` library reads. As of 0.8 it cannot write for us: it orders metadata randomly, so the
files of equal runs would differ; a full disk raises no OSError; and only the owner may read the file,
whatever the umask.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memory_bank.replacing import replacing

#: Name of the seal among the metadata.
SEAL = "seal"
_UNSEALED = "0" * 64

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FormatError(ValueError):
    """The file is not a valid safetensors file; the message names the file and what is wrong."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: after a crash ``path`` is the old file or all of the new one.

    Args:
        path: Replaced if it exists.
        tensors: By name.
        metadata: Strings; a ``seal`` among them is replaced by the file's own.

    Raises:
        ValueError: an unsupported dtype, a tensor named ``__metadata__``, metadata or names that
            UTF-8 cannot hold.
        OSError: from the file system; ``path`` is then unchanged.
    """
    # Wide types first, as the library does: every tensor is then aligned to its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(ordered, dict(metadata) | {SEAL: _UNSEALED})
    digest = hashlib.sha256(header)
    with replacing(path) as partial, partial.open("wb") as file:
        file.seek(len(header))
        for tensor in ordered.values():
            if not tensor.numel():  # NumPy's empty arrays have a stride of 0, which cannot be viewed as bytes
                continue
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_with_seal(header, _UNSEALED, digest.hexdigest()))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (on the CPU, in memory of their own) and metadata.

    Raises:
        FormatError: not such a file, or a wrong seal; raised before any tensor is created.
        OSError: the file cannot be read.
    """
    try:
        # Not the library's default, a memory map: its tensors would change, or kill us, with the file.
        with path.open("rb") as file, safe_open(path, "pt", backend="pread") as opened:
            metadata = dict(sorted((opened.metadata() or {}).items()))  # they come in random order
            if SEAL in metadata:
                _check_seal(file, metadata[SEAL])
            return opened.get_tensors(), metadata
    except (SafetensorError, FormatError, RuntimeError, TypeError) as error:  # torch's for absurd shapes
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from error


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length of the header and the header."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ValueError(f"{name!r} ({tensor.dtype}): cannot be written; allowed are {allowed}")
        end = begin + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _with_seal(header: bytes, old: str, new: str) -> bytes:
    """Replace the seal's digits in ``header``; the quotes around them cannot occur inside another string."""
    name = json.dumps(SEAL) + ":"
    return header.replace(f"{name}{json.dumps(old)}".encode(), f"{name}{json.dumps(new)}".encode(), 1)


def _check_seal(file: BinaryIO, seal: str) -> None:
    length = file.read(8)
    header = length + file.read(int.from_bytes(length, "little"))
    digest = hashlib.sha256(_with_seal(header, seal, _UNSEALED))
    while piece := file.read(1 << 20):
        digest.update(piece)
    if digest.hexdigest() != seal:
        raise FormatError(
            f"its SHA-256 differs from its {SEAL}: damaged, altered, or saved again by another tool; take "
            "the original file, or save the tensors without its metadata, as weights of torchvision are"
        )

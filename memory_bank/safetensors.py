"""The safetensors format: little-endian tensors behind a JSON header; nothing in a file is ever executed.

Layout (https://huggingface.co/docs/safetensors): 8 bytes, the header's length as an unsigned integer; the
header, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, padded with
spaces; the data, which the offsets must cover without hole or overlap.

What is written here carries a seal among its metadata: the SHA-256 of the whole file with the seal's own 64
digits zero. The format itself has no checksum, and a flipped bit in a weight is a valid weight.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memory_bank.replacing import replacing

#: The reference library's bound on the header.
MAX_HEADER_BYTES = 100_000_000
MAX_FILE_BYTES = 2**34
MAX_AXES = 16
#: Name of the seal among the metadata.
SEAL = "seal"
_UNSEALED = "0" * 64

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FormatError(ValueError):
    """The file is not a valid safetensors file; the message names the file and what is wrong."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: ``path`` holds either what it held before or all of the new file, also on a crash.

    Args:
        path: Replaced if it exists.
        tensors: By name.
        metadata: Strings; a ``seal`` among them is replaced by the file's own.

    Raises:
        ValueError: a dtype the format does not know here, or a tensor named ``__metadata__``.
        OSError: from the file system; ``path`` is then unchanged.
    """
    _require_little_endian()
    # Wide types first, as the library does: every tensor is then aligned to its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(ordered, dict(metadata) | {SEAL: _UNSEALED})
    digest = hashlib.sha256(header)
    with replacing(path) as partial, partial.open("wb") as file:
        file.seek(len(header))
        for tensor in ordered.values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_with_seal(header, _UNSEALED, digest.hexdigest()))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU, in memory of their own) and metadata.

    Raises:
        FormatError: anything that is not exactly the format, or a seal that does not hold, before any
            tensor is made.
        OSError: the file cannot be read.
    """
    _require_little_endian()
    try:
        with path.open("rb") as file:
            entries, metadata, start = _read_header(file)
            if SEAL in metadata:
                _check_seal(file, metadata[SEAL], start)
            tensors = {name: _read_tensor(file, start, entry) for name, entry in entries.items()}
    except FormatError as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from error
    return tensors, metadata


def _with_seal(header: bytes, old: str, new: str) -> bytes:
    """``header`` with the seal's digits replaced; inside a string the quotes would be escaped."""
    name = json.dumps(SEAL) + ":"
    return header.replace(f"{name}{json.dumps(old)}".encode(), f"{name}{json.dumps(new)}".encode(), 1)


def _check_seal(file: BinaryIO, seal: str, start: int) -> None:
    file.seek(0)
    digest = hashlib.sha256(_with_seal(file.read(start), seal, _UNSEALED))
    while piece := file.read(1 << 20):
        digest.update(piece)
    if digest.hexdigest() != seal:
        raise FormatError(f"its SHA-256 differs from its {SEAL}: damaged or altered")


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Its length and the header itself."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in _NAMES:
            allowed = ", ".join(str(dtype) for dtype in _NAMES)
            raise ValueError(f"{name!r} ({tensor.dtype}): cannot be written; allowed are {allowed}")
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(file: BinaryIO) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Checked entries and metadata, and where the data starts."""
    size = os.fstat(file.fileno()).st_size
    if not 8 <= size <= MAX_FILE_BYTES:
        raise FormatError(f"{size} bytes; allowed are 8 to {MAX_FILE_BYTES}")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(f"header of {length} bytes in a file of {size}")
    entries = _parse(file.read(length))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("metadata must map strings to strings")
    begin = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        begin = _check(name, entry, begin)
    if begin != size - 8 - length:
        raise FormatError(f"tensors cover {begin} bytes, the file has {size - 8 - length} after the header")
    return entries, metadata, 8 + length


def _parse(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also bad UTF-8; a FormatError is a ValueError too
        raise FormatError(f"header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise FormatError("header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("a name occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise FormatError(f"{name} is not JSON")


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """Begin and end; the order in which tensors must follow each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name!r}: dtype, shape and data_offsets are needed, nothing else")
    offsets = entry["data_offsets"]
    if not _is_counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{name!r}: data_offsets={offsets!r:.80} must be two non-negative integers")
    return offsets[0], offsets[1]


def _check(name: str, entry: dict[str, Any], expected: int) -> int:
    """Check one entry that must begin at ``expected``; returns its end."""
    begin, end = _offsets(name, entry)
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{name!r}: dtype={dtype!r:.80}; allowed are {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > MAX_AXES or math.prod(max(side, 1) for side in shape) > 2**40:
        raise FormatError(f"{name!r}: shape={shape!r:.80} must be up to {MAX_AXES} non-negative integers")
    if begin != expected:
        raise FormatError(f"{name!r} begins at {begin}, the tensor before it ends at {expected}")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise FormatError(f"{name!r}: {end - begin} bytes do not hold {dtype} of shape {shape}")
    return end


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_tensor(file: BinaryIO, start: int, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if begin == end:
        return torch.empty(shape, dtype=dtype)  # frombuffer refuses an empty buffer
    file.seek(start + begin)
    data = bytearray(file.read(end - begin))
    if len(data) != end - begin:
        raise FormatError("the file shrank while it was read")
    if dtype is torch.bool and max(data) > 1:
        raise FormatError("a boolean is neither 0 nor 1")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian; this machine is not")

"""Save and load files of tensors and plain containers, which torch reads without running code."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive.checkpoint.integrity import CorruptCheckpoint
from contrastive.config import first_line

_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), torch.Size, torch.dtype, torch.device)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, tuple, set)


def check_plain(value: Any, where: str) -> None:
    """Raise TypeError, when saving, for a value that ``weights_only`` loading would refuse later."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Tensor):
        return
    if kind not in _MAPPINGS + _SEQUENCES:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which only pickled code could load; "
            "save numbers, strings, tensors and plain containers of these"
        )
    items: Iterator[tuple[Any, Any]] = iter(value.items() if kind in _MAPPINGS else enumerate(value))
    for key, item in items:
        check_plain(key, f"key {key!r} of {where}")
        check_plain(item, f"{where}[{key!r}]")


def save(value: Any, path: Path) -> None:
    """Write ``value``; a full disk raises OSError."""
    with path.open("wb", buffering=1 << 20) as file:
        output = _Output(file)
        try:
            torch.save(value, output)  # type: ignore[arg-type]
        except RuntimeError as error:
            if output.error is not None:
                raise output.error from error
            raise


class _Output:
    """File wrapper that records the OSError of a failed write: torch.save raises RuntimeError instead."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written: int = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        return written

    def flush(self) -> None:
        self.file.flush()


def load(path: Path, map_location: Any) -> Any:
    """Load a file that ``save`` wrote.

    Raises:
        CorruptCheckpoint: it is damaged, or contains anything else.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # unpicklers raise a dozen types on damaged or malicious bytes
        reason = first_line(error)
        raise CorruptCheckpoint(
            f"{path}: refused, more than tensors and plain containers ({reason})"
        ) from error

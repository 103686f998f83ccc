"""Write and read metrics.csv: one row per logged step, intact after a kill, rewound on resume."""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from contrastive.config import UserError
from memory_bank.replacing import replacing

_FIXED = ("step", "epoch", "seconds")


class MetricsCsv(Logger):
    """Writes ``metrics.csv``: columns step, epoch, seconds, then metrics in the order they first appeared.

    Each call writes whole lines in one system call before it returns, so that a kill leaves whole rows. Calls
    with the same step share a row; a new metric adds a column by an atomic rewrite. A full disk is reported
    once; rows are lost until there is space again.

    Args:
        run_dir: The run directory; an existing metrics.csv in it is continued, see :meth:`rewind`.

    Attributes:
        path: The file.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] | None = None  # None: unknown, read the file first
        self._row: dict[str, str] = {}  # the last row, at self._offset
        self._line = b""
        self._offset = 0
        self._warned = False
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the run directory."""
        return str(self.path.parent)

    @property
    def seconds(self) -> float:
        """Wall time since construction, plus that of earlier starts of the run."""
        return self._seconds + time.monotonic() - self._since

    def state_dict(self) -> dict[str, float]:
        """Return the time so far, for a resume."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue the clock of :meth:`state_dict` from now."""
        self._seconds, self._since = float(state["seconds"]), time.monotonic()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write ``metrics`` into the row of ``step``.

        Raises:
            ValueError: no step, or a name that a csv header cannot hold.
        """
        if step is None:
            raise ValueError("metrics.csv: step=None; give the optimizer step the metrics belong to")
        cells = {name: _cell(name, value) for name, value in metrics.items() if name != "step"}
        cells |= {"step": str(int(step)), "seconds": repr(round(self.seconds, 3))}
        try:
            self._write(cells)
        except OSError as error:
            self._columns = None  # the last line may be torn: read the file again before the next write
            self._warn(
                f"{self.path}: cannot be written ({error.strerror}); training continues, rows are missing"
            )

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows after ``step`` and a torn last line; a run resumed at ``step`` writes them again."""
        rows = [row for row in self._read() if int(row["step"]) <= step]
        if self.path.exists():
            self._rewrite(rows)

    def _write(self, cells: dict[str, str]) -> None:
        if self._columns is None:
            self._read()
        assert self._columns is not None
        step, last = int(cells["step"]), int(self._row.get("step", -1))
        added = [name for name in cells if name not in self._columns]
        if added or step < last:
            rows = {row["step"]: row for row in self._read()}
            rows[cells["step"]] = rows.get(cells["step"], {}) | cells
            self._columns += added
            self._rewrite(sorted(rows.values(), key=lambda row: int(row["step"])))
            return
        if step > last:
            self._row = {}
            self._offset += len(self._line)
        self._row |= cells
        self._line = self._format(self._row)
        _write_at(self.path, self._offset, self._line)

    def _read(self) -> list[dict[str, str]]:
        """Return the rows of the file; store its columns and the offset of its last row."""
        table = _table(self.path)
        self._columns = table.columns
        self._row = table.rows[-1] if table.rows else {}
        self._line = self._format(self._row) if table.rows else b""
        self._offset = table.end - len(self._line)
        if table.dropped:
            self._warn(f"{self.path}: {table.dropped} unreadable lines are dropped")
            self._rewrite(table.rows)
        return table.rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        lines = [",".join(self._columns).encode() + b"\n", *map(self._format, rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial, partial.open("wb") as file:
            file.writelines(lines)
        self._row = rows[-1] if rows else {}
        self._line = lines[-1] if rows else b""
        self._offset = sum(map(len, lines)) - len(self._line)

    def _format(self, row: Mapping[str, str]) -> bytes:
        assert self._columns is not None
        return ",".join(row.get(name, "") for name in self._columns).encode() + b"\n"

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Read the columns of a metrics.csv by name, NaN for missing values; a torn last line is left out.

    Raises:
        UserError: no such file, or not a metrics.csv.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the metrics.csv of a run directory")
    table = _table(Path(path))
    return {name: [float(row[name] or "nan") for row in table.rows] for name in table.columns}


@dataclass
class _Table:
    """The content of a metrics.csv.

    Attributes:
        columns: Names; the three fixed ones if there is no file yet.
        rows: Cells by column, in the order of the file.
        end: Offset after the last whole line; the rest was torn by a kill.
        dropped: Number of malformed lines before ``end`` (full disk, crash of the machine).
    """

    columns: list[str]
    rows: list[dict[str, str]]
    end: int
    dropped: int


def _table(path: Path) -> _Table:
    text = path.read_bytes() if path.exists() else b""
    end = text.rfind(b"\n") + 1
    header, *lines = text[:end].decode(errors="replace").split("\n")[:-1] or [",".join(_FIXED)]
    columns = header.split(",")
    if tuple(columns[:3]) != _FIXED:
        raise UserError(f"{path}: not a metrics.csv, its header starts with {header[:40]!r}; move it away")
    rows = [
        dict(zip(columns, cells, strict=True))
        for cells in (line.split(",") for line in lines)
        if len(cells) == len(columns) and cells[0].isdecimal() and all(map(_is_number, cells))
    ]
    return _Table(columns, rows, end, len(lines) - len(rows))


def _is_number(cell: str) -> bool:
    with contextlib.suppress(ValueError):
        float(cell or "nan")
        return True
    return False


def _cell(name: str, value: float) -> str:
    if not name or set(name) & set(',"\r\n'):
        raise ValueError(f"metric name {name!r}: it needs a character, and no comma, quote or line end")
    number = float(value)
    return str(int(number)) if name == "epoch" and number.is_integer() else repr(number)


def _write_at(path: Path, offset: int, line: bytes) -> None:
    """Write ``line`` at ``offset``, where the file then ends, in one write so that a kill cannot tear it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        rest = line
        while rest:  # after a short write, the next one raises the reason
            rest = rest[os.write(descriptor, rest) :]
        os.ftruncate(descriptor, offset + len(line))
    finally:
        os.close(descriptor)

"""What a run says while it trains: metrics.csv, Weights & Biases, throughput, the progress bar.

Names of metrics are ``group/name``, the same in metrics.csv and on W&B:

======== ==========================================================
train/   loss, learning rate, momentum, logits of the step
mining/  similarity and age of mined negatives, drop rates, recall
bank/    fill, age, refused rows
views/   augmented views
probe/   online linear probe
knn/     online nearest-neighbour score
stats/   collapse: rank, per-dimension deviation, uniformity
perf/    images_per_s, step_ms, data_wait
data/    corrupt and skipped files
system/  memory of host and device
======== ==========================================================

A row belongs to an optimizer step, counted as in ``checkpoints/step-N``: row N is the state after N steps.
Lightning's own ``self.log`` counts from 0 and reaches the loggers only *after* the callbacks that save, so a
kill would lose a row; :func:`log_row` from a callback or from ``optimizer_step`` does neither.
"""

import contextlib
import importlib.util
import netrc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from contrastive.config import UserError, WandbConfig

GROUPS = ("train", "mining", "bank", "views", "probe", "knn", "stats", "perf", "data", "system")
"""Groups of metric names; the module's docstring says what is in each."""

STEP_AXIS = "trainer/global_step"
"""W&B's x axis: optimizer steps (the name Lightning's WandbLogger gives it)."""

_INIT_TIMEOUT_S = 30.0  # for the first answer of the W&B server
_FIXED = ("step", "epoch", "seconds")


def log_row(trainer: Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Send ``metrics`` to all loggers as (part of) the row of the optimizer steps taken so far.

    Scalar tensors of one device are fetched in one transfer; ``epoch`` may be among them. Only
    rank 0 logs.
    """
    if not trainer.loggers or not trainer.is_global_zero:
        return
    values = _floats(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_interval(trainer: Trainer) -> int:
    """Optimizer steps between two rows, ``Trainer(log_every_n_steps=...)``; 0 logs nothing."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
    return every


def is_logged(trainer: Trainer) -> bool:
    """Whether the optimizer step just done has a row: one in every interval, and the run's last."""
    every, step = log_interval(trainer), trainer.global_step
    return every > 0 and (step % every == 0 or step == trainer.max_steps or trainer.is_last_batch)


def _floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    values = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        values |= dict(
            zip(names, torch.stack([tensors[name].to(wide) for name in names]).tolist(), strict=True)
        )
    return {name: float(values[name]) for name in metrics}


# ----------------------------------------------------------------------------------------------- metrics.csv


class MetricsCsv(Logger):
    """Writes ``metrics.csv``: columns step, epoch, seconds, then metrics in the order they first appeared.

    Each call is on its way to the disk when it returns, by one write of whole lines, so that a kill leaves
    whole rows. Calls with the same step share a row; a metric not seen before widens the table by an atomic
    rewrite. A disk that is full is reported once, rows are lost until there is space again.

    Args:
        run_dir: The run directory; an existing metrics.csv in it is continued, see :meth:`rewind`.

    Attributes:
        path: The file.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] | None = None  # None: what the file holds is not known, read it first
        self._row: dict[str, str] = {}  # the last row, which lies at self._offset
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
        """The run directory."""
        return str(self.path.parent)

    @property
    def seconds(self) -> float:
        """Wall time since construction, plus that of the runs this one continues."""
        return self._seconds + time.monotonic() - self._since

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs: the time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue the clock of :meth:`state_dict` from now."""
        self._seconds, self._since = float(state["seconds"]), time.monotonic()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

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
            self._columns = None  # the last line may be torn: read the file again before the next
            self._warn(
                f"{self.path}: cannot be written ({error.strerror}); training goes on, rows are missing"
            )

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, and a torn last line: a run that resumes there writes them again."""
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
        """The rows of the file; remembers its columns and where its last row lies."""
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
        partial = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
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
    """The columns of a metrics.csv by name, NaN where a row has no value; a torn last line is left out.

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
        end: Offset after the last whole line; what follows was torn by a kill.
        dropped: Lines before that which are no rows (a disk that was full, a crash of the machine).
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
    """Put ``line`` at ``offset`` as the end of the file, in one write so that a kill cannot cut it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        rest = line
        while rest:  # a write that comes back short is followed by one that says why
            rest = rest[os.write(descriptor, rest) :]
        os.ftruncate(descriptor, offset + len(line))
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------- wandb


def build_wandb(
    config: WandbConfig, run_dir: Path, run_name: str, run_id: str | None, resolved: dict[str, Any]
) -> WandbLogger | None:
    """Start (or with ``run_id`` continue) the W&B run; None when W&B is off.

    Mode ``auto`` is ``WANDB_MODE`` if set, else online where credentials are found (without asking or using
    the network), else off with a line on stderr. When W&B cannot be reached the run goes on offline, with a
    line on stderr. All files are written below ``run_dir/wandb``.

    Args:
        config: Mode, project, entity, tags.
        run_dir: The run directory.
        run_name: Shown on W&B.
        run_id: Of the run to continue: ``logger.version`` of the first part, kept in the checkpoint.
        resolved: The whole config, shown on W&B.

    Raises:
        UserError: ``online`` or ``offline`` without the package, ``online`` without credentials.
    """
    mode = _wandb_mode(config.mode)
    if mode == "disabled":
        return None
    keep: dict[str, Any] = {"project": config.project, "save_dir": run_dir, "id": run_id}
    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(**keep)  # starts nothing: its methods work on rank 0 only
    run = _start_wandb(
        mode,
        project=config.project,
        entity=config.entity,
        tags=config.tags or None,
        name=run_name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        config=resolved,
    )
    run.define_metric(STEP_AXIS)
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric=STEP_AXIS)
    return WandbLogger(**keep | {"id": run.id}, experiment=run)


def _wandb_mode(mode: str) -> str:
    """``online``, ``offline`` or ``disabled``; ``auto`` is resolved, the others are checked."""
    if mode == "auto":
        mode = _environment_mode()
    if mode == "disabled":
        return mode
    problem = _wandb_problem(mode)
    if problem is None:
        return "online" if mode == "auto" else mode
    if mode == "auto":
        _say(f"W&B is off: {problem}; or set logging.wandb.mode=offline, or =disabled to hide this line")
        return "disabled"
    raise UserError(f"W&B mode {mode!r}: {problem}; or set logging.wandb.mode=disabled")


def _environment_mode() -> str:
    mode = os.environ.get("WANDB_MODE", "auto").replace("dryrun", "offline")
    return mode if mode in ("online", "offline", "disabled") else "auto"


def _wandb_problem(mode: str) -> str | None:
    if importlib.util.find_spec("wandb") is None:
        return "the package is not installed, run 'pip install wandb'"
    if mode != "offline" and not _wandb_credentials():
        return "not logged in, run 'wandb login' or set WANDB_API_KEY"
    return None


def _wandb_credentials() -> bool:
    """Whether wandb would find a key where it looks; its own functions for this differ by version."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _wandb_settings_file()
    return "api_key" in settings or _in_netrc(_wandb_hosts(settings))


def _wandb_settings_file() -> Mapping[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    parser = ConfigParser(interpolation=None)
    with contextlib.suppress(ConfigParserError, OSError, UnicodeDecodeError):
        parser.read(folder / "settings")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _wandb_hosts(settings: Mapping[str, str]) -> set[str]:
    import wandb

    if own := os.environ.get("WANDB_BASE_URL") or settings.get("base_url"):
        return {urlsplit(own).netloc}
    # Newer releases talk to another host by default and take the key of the classic one too.
    return {urlsplit(str(wandb.Settings().base_url)).netloc, "api.wandb.ai"}


def _in_netrc(hosts: set[str]) -> bool:
    own = os.environ.get("NETRC")
    candidates = [Path(own)] if own else [Path("~/.netrc"), Path("~/_netrc")]
    for path in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if hosts & netrc.netrc(path.expanduser()).hosts.keys():
                return True
    return False


def _start_wandb(mode: Any, **arguments: Any) -> Any:
    import wandb

    folder = Path(arguments["dir"]) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    # Logs of its service process and staged files, which would be below $HOME.
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder / "cache"))
    settings = wandb.Settings(init_timeout=_INIT_TIMEOUT_S)
    if hasattr(settings, "finish_timeout"):  # not in early releases
        settings.finish_timeout = 300.0
    with _children_print_to_stderr():
        try:
            return wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if mode == "offline":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _say(f"W&B cannot be reached ({reason}); going on offline, for later: wandb sync {folder}/off*")
            wandb.teardown()  # or the run id stays in use
            return wandb.init(mode="offline", settings=settings, **arguments)


@contextlib.contextmanager
def _children_print_to_stderr() -> Iterator[None]:
    """Let processes started meanwhile have stderr for stdout: W&B's service prints, stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@rank_zero_only
def _say(message: str) -> None:
    print(message, file=sys.stderr)


# ----------------------------------------------------------------------------------- throughput and progress


_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""What Lightning tells its profiler it does while it waits for the loader."""


class Throughput(Callback):
    """Logs ``perf/images_per_s``, ``perf/step_ms`` and ``perf/data_wait`` at the trainer's log interval.

    Means since the previous row: images (not views) a second over all ranks, milliseconds of an optimizer
    step, and the share of that time spent waiting for the loader. What is done :func:`off_the_clock`, such as
    saving, is left out. Only the host's clock is read: on an accelerator, which works behind the host, the
    numbers hold over an interval, not for one step.

    Args:
        images: Number of images in a batch of this rank.
    """

    def __init__(self, images: Callable[[Any], int] = lambda batch: len(batch.images)) -> None:
        self._images = images
        self._since, self._step, self._count = 0.0, 0, 0
        self._wait_s, self._fetching = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._reset(trainer.global_step)
        self._listen(_profiler(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log at the interval."""
        self._count += self._images(batch)
        step = trainer.global_step
        if step > self._step and is_logged(trainer):
            log_row(trainer, self._metrics(step, trainer.world_size))
            self._reset(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the profiler as it was."""
        self._unlisten(_profiler(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the profiler as it was."""
        self._unlisten(_profiler(trainer))

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training off the clock."""
        self._since += seconds

    def _metrics(self, step: int, ranks: int) -> dict[str, float]:
        total = time.perf_counter() - self._since
        return {
            "perf/images_per_s": ranks * self._count / total,
            "perf/step_ms": 1000 * total / (step - self._step),
            "perf/data_wait": self._wait_s / total,
        }

    def _reset(self, step: int) -> None:
        self._since, self._step, self._count, self._wait_s = time.perf_counter(), step, 0, 0.0

    def _listen(self, profiler: Any) -> None:
        """Hear when Lightning starts and stops waiting: no callback's hook tells that."""
        start, stop = profiler.start, profiler.stop

        def timed_start(action: str) -> None:
            start(action)
            if action == _FETCH:
                self._fetching = time.perf_counter()

        def timed_stop(action: str) -> None:
            stop(action)
            if action == _FETCH:
                self._wait_s += time.perf_counter() - self._fetching

        profiler.start, profiler.stop = timed_start, timed_stop

    def _unlisten(self, profiler: Any) -> None:
        for name in ("start", "stop"):  # instance attributes, which hid the methods of the class
            vars(profiler).pop(name, None)


def _profiler(trainer: Trainer) -> Any:
    return trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's set-up functions


@contextlib.contextmanager
def off_the_clock(trainer: Trainer) -> Iterator[None]:
    """Around work that is no training (saving, scoring): :class:`Throughput` leaves its time out."""
    started = time.perf_counter()
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
            if isinstance(callback, Throughput):
                callback.leave_out(time.perf_counter() - started)


class _StderrBar(TQDMProgressBar):
    """Lightning's tqdm bar on stderr: stdout is for results."""

    # Lightning passes file=sys.stdout; a bar draws itself when it is made, so changing it later is too late.

    def init_sanity_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_sanity_tqdm()

    def init_train_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()


class _RichBar(RichProgressBar):
    """Lightning's rich bar, told of a run that is one pass: "Epoch 0/0" would puzzle."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Pretraining"


def progress_bar(enabled: bool) -> Callback | None:
    """A progress bar on stderr, by rich if it is installed, else by tqdm; None if not ``enabled``."""
    if not enabled:
        return None
    if importlib.util.find_spec("rich") is None:
        return _StderrBar()
    return _RichBar(console_kwargs={"stderr": True})

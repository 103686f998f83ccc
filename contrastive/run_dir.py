"""Manage the run directory: check what it holds, lock it, write config, manifest and corrupt.csv."""

import csv
import importlib
import io
import json
import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from contrastive.checkpoint.folder import latest_valid
from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import differences, load_saved
from contrastive.data.image_list import describe_changes, read_image_list, write_image_list
from contrastive.data.images import Images
from memory_bank.replacing import write_text

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

MAY_CHANGE = (
    "trainer",
    "logging.",
    "run.resume",
    "run.keep_last",
    "run.requeue",
    "run.hang_s",
    "run.checkpoint_every",
    "run.compile",
    "run.root",
    "data.num_workers",
    "data.resident",
    "data.cache",
    "data.remote.",
    "data.allow_changed",
    "data.max_corrupt",
    "mining.overlap",
    "encoder.grad_checkpointing",
    "chosen",
    "profile",
)
"""Settings that may differ when a run is resumed; a change of any other makes it another run."""

FILES = (
    "metrics.csv",
    "encoder.safetensors",
    "mined.csv",
    "views.png",
    "bank.png",
    "corrupt.csv",
    "summary.json",
    "checkpoints/last",
)
"""Files that a run writes, besides its config, manifest and checkpoints."""


def find_start_point(
    run_dir: Path,
    config: PretrainConfig,
    images: Images,
    steps: int,
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any] | None, Path | None]:
    """Decide how to start: return the summary if finished, the checkpoint to resume from, or neither.

    Nothing is written. A run is finished if its summary has ``steps``, or the steps that fitted into its time
    budget.

    Args:
        run_dir: The run directory.
        config: The run.
        images: The training images.
        steps: Optimizer steps of the run.
        given: Names of the parts that a program hands over in place of the config's.

    Raises:
        UserError: not writable, not a run directory, the directory of another run, or changed data.
    """
    check_writable(run_dir)
    if not is_first_rank():
        # Rank 0 checks the directory; the others must not wait for it if the run is finished.
        summary = _read_summary(run_dir / "summary.json")
        if _is_finished(summary, steps):
            return summary, None
    unfinished = {".lock", "manifest.csv"}  # may be left by a start that was killed at once
    if is_first_rank() and run_dir.is_dir() and {path.name for path in run_dir.iterdir()} - unfinished:
        _check_same_run(run_dir, config, images, given or {})
        summary = _read_summary(run_dir / "summary.json")
        if _is_finished(summary, steps):
            return summary, None
    _check_entries(run_dir)
    checkpoint = latest_valid(run_dir / "checkpoints")
    if checkpoint is None and any((run_dir / "checkpoints").glob("step-*")):
        raise UserError(
            f"{run_dir}: none of its checkpoints can be read (see the warnings above); restore one, "
            "or remove the directory to start over"
        )
    return None, checkpoint


def _is_finished(summary: dict[str, Any], steps: int) -> bool:
    planned = summary.get("planned_steps") or steps  # known by the summary alone, in a run with a time budget
    return bool(summary.get("steps", -1) >= min(steps, planned))


def _read_summary(path: Path) -> dict[str, Any]:
    """Read the summary; empty if unreadable, which is harmless: the checkpoints hold the same facts."""
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def is_first_rank() -> bool:
    """Return whether this process is rank 0; before a process group exists, by the launcher's environment."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_writable(run_dir: Path) -> None:
    """Raise UserError if the run's directory cannot be created or written."""
    parent = run_dir
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"run directory {run_dir}: {parent} is not a writable folder; set run.root or run.name"
        )


def _check_entries(run_dir: Path) -> None:
    """Raise UserError if a file that the run will write exists and cannot be replaced."""
    for name in FILES:
        path = run_dir / name
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            raise UserError(
                f"{path}: the run writes this file, but it is not a regular file or may not be read and "
                "written; move it away, or choose another run.name"
            )


def _check_same_run(run_dir: Path, config: PretrainConfig, images: Images, given: Mapping[str, str]) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: holds files but no config.yaml, so it is not a run; choose another run.name"
        )
    if config.run.resume == "never":
        raise UserError(f"{run_dir}: exists; choose another run.name, or continue it with run.resume=auto")
    saved = _load_config(run_dir)
    if not is_begun(run_dir):
        return
    changed = [
        f"{name} was {old!r}, is {new!r}"
        for name, (old, new) in differences(saved, config).items()
        if not name.startswith(MAY_CHANGE)
    ]
    before = OmegaConf.select(OmegaConf.load(run_dir / "config.yaml"), "provenance.given")
    before = given if before is None else before  # earlier releases did not record them
    changed += [
        f"pretrain({name}=) was {before.get(name)}, is {given.get(name)}"
        for name in sorted({*before, *given})
        if before.get(name) != given.get(name)
    ]
    if changed:
        raise UserError(
            f"{run_dir}: holds a different run ({'; '.join(changed)}); "
            "choose another run.name or the old values; to train on from its weights, choose another "
            f"run.name and set encoder.weights={run_dir / 'encoder.safetensors'}"
        )
    if not config.data.allow_changed:
        if not (run_dir / "manifest.csv").is_file():
            raise UserError(
                f"{run_dir}: manifest.csv is missing, so changed data cannot be detected; restore it, choose "
                "another run.name, or trust the data with data.allow_changed=true"
            )
        changes = describe_changes(read_image_list(run_dir / "manifest.csv"), images)
        if changes:
            raise UserError(
                f"{run_dir}: the data changed since this run began: {changes}; restore it, choose another "
                "run.name, or accept it with data.allow_changed=true"
            )


def _load_config(run_dir: Path) -> PretrainConfig:
    saved = load_saved(PretrainConfig, run_dir / "config.yaml")
    # A run is saved with the crop that was chosen; earlier releases knew the square alone.
    return replace(saved, data=replace(saved.data, crop=saved.data.crop.replace("auto", "square")))


def begun_config(run_dir: Path) -> PretrainConfig | None:
    """Return the config of the run that was begun in this directory; None without one.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    begun = is_begun(run_dir) and (run_dir / "config.yaml").is_file()
    return _load_config(run_dir) if begun else None


def is_begun(run_dir: Path) -> bool:
    """Return whether a step was taken; before that, another run may still use the directory."""
    return (run_dir / "checkpoints").exists() or (run_dir / "metrics.csv").exists()


def lock_run_dir(run_dir: Path) -> IO[str]:
    """Create the directory and lock it against a second run, for as long as the returned file is open.

    Raises:
        UserError: it cannot be created, or a running process has locked it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run directory {run_dir}: {error.strerror}; set run.root or run.name") from error
    if fcntl is not None:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise UserError(
                f"{run_dir}: process {holder} is training here; wait for it, or choose another run.name"
            ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def write_run_files(
    run_dir: Path, config: PretrainConfig, images: Images, given: Mapping[str, str] | None = None
) -> None:
    """Write manifest.csv, which every resume checks, and last config.yaml, which makes the folder a run."""
    begun, manifest = (run_dir / "config.yaml").is_file() and is_begun(run_dir), run_dir / "manifest.csv"
    if not begun or config.data.allow_changed:
        before = manifest.read_bytes() if begun and manifest.is_file() else None
        write_image_list(manifest, images)
        if manifest.read_bytes() != before:  # rows of corrupt.csv are numbered by it
            (run_dir / "corrupt.csv").unlink(missing_ok=True)
    if begun:
        return
    document = OmegaConf.structured(config)
    OmegaConf.set_struct(document, False)
    document.provenance = provenance() | {"given": dict(given or {}), "root": _absolute(config.data.root)}
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(document))


def _absolute(root: str | None) -> str | None:
    """Return a folder's path from the root of the file system; None where ``data.root`` is no folder here."""
    path = os.path.expanduser(root or "")
    return os.path.realpath(path) if os.path.isdir(path) else None


def provenance() -> dict[str, Any]:
    """Return commit, package versions, and the id of the W&B run, which a resume continues."""
    packages = ("torch", "torchvision", "pytorch-lightning", "kornia", "faiss-cpu", "omegaconf")
    return {
        "commit": _commit(),
        # The agent of a W&B sweep has already chosen the run's id.
        "wandb_id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
        **{name: metadata.version(name) for name in packages},
    }


@cache
def _commit() -> str:
    """Return the commit of this code; a process asks git once, since its modules stay those it imported."""
    command = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


class UnreadableFiles:
    """The rows of corrupt.csv; each unreadable row is listed once, over all ranks and resumes.

    Known rows stay in memory, and only what was appended since is read from the file.

    Args:
        path: The file; created with the first row.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] = set()
        self._end = 0  # bytes read so far

    def __len__(self) -> int:
        """Count the rows in the file, including those that other ranks added."""
        if not self.path.is_file():
            self._forget()
        elif self.path.stat().st_size != self._end:
            with self._open() as file:
                self._read_rest(file)
        return len(self._known)

    def add(self, row: int, key: str, reason: str) -> None:
        """Append a row, unless the file already has it."""
        if str(row) in self._known:
            return
        with self._open() as file:
            self._read_rest(file)
            if str(row) in self._known:
                return
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            if not self._end:
                writer.writerow(["row", "key", "reason"])
            writer.writerow([row, key, reason])
            self._end += file.write(text.getvalue().encode())
            self._known.add(str(row))

    def _open(self) -> IO[bytes]:
        """Open for reading and appending, locked until it is closed."""
        file = self.path.open("ab+")
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX)
        return file

    def _read_rest(self, file: IO[bytes]) -> None:
        if os.fstat(file.fileno()).st_size < self._end:  # another file than before
            self._forget()
        file.seek(self._end)
        added = file.read()
        lines = csv.reader(io.StringIO(added.decode(errors="replace"), newline=""))
        self._known |= {line[0] for line in lines if line} - {"row"}
        self._end += len(added)

    def _forget(self) -> None:
        self._known, self._end = set(), 0

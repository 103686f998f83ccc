"""Durable checkpoints: immutable directories that are either complete and unaltered, or refused.

A checkpoint is a directory ``checkpoints/step-N/``::

    trainer.pt            Lightning's checkpoint dict, less the bank
    bank.safetensors      the miner's state_dict (the dict's ``"miner"`` entry), if there is one
    encoder.safetensors   and whatever else the caller's ``extra_files`` wrote
    manifest.json         format version, step, size and SHA-256 of every file and of itself; written last

and beside the directories ``last``, a one-line text file with the name of the newest. (A symbolic link would
be shorter, but Windows, object stores and many archive tools do not keep one.)

A save fills a hidden directory, flushes every file and the directory to disk, renames it to its final name,
flushes the parent, replaces ``last`` and only then removes old checkpoints. So wherever it is killed there is
a loadable checkpoint, and a directory with a visible name is complete. Reading never runs pickled code: every
``torch.load`` is ``weights_only=True``, and nothing is loaded before all hashes agree. The hashes detect
damage; they are no signature.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from contrastive.config import UserError
from contrastive.distributed import note_entry
from contrastive.logging.throughput import off_the_clock
from contrastive.signals import SIGNALS, hand_back, take_over
from memory_bank.replacing import sync
from memory_bank.state import BANK, read_state, save_state

FORMAT = 2
MANIFEST = "manifest.json"
TRAINER = "trainer.pt"
LAST = "last"
BANK_KEY = "miner"

ExtraFiles = Callable[[dict[str, Any], Path], None]
"""Writes further files of a checkpoint: gets Lightning's checkpoint dict and the directory being filled."""

_STEP = re.compile(r"step-(\d+)")
_HIDDEN = re.compile(r"\.(step-\d+|last)\.[0-9a-f]{8}\.(partial|removed)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST_LIMIT = 1 << 20  # bytes; a real one has a few hundred, a hostile one must not fill the memory
_FORCE_PICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class CorruptCheckpoint(UserError):
    """A checkpoint is incomplete, damaged or altered; the message names it and what is wrong."""


# --------------------------------------------------------------------------------------------------- reading


def verify(path: Path) -> int:
    """Check every byte of the checkpoint directory ``path`` against its manifest.

    Returns:
        The optimizer step it was saved at.

    Raises:
        CorruptCheckpoint: anything missing, added, altered, linked, or named so that it could leave ``path``.
    """
    manifest = _read_manifest(path)
    files = manifest["files"]
    found = {entry.name for entry in os.scandir(path)} - {MANIFEST}
    if missing := sorted(files.keys() - found):
        raise CorruptCheckpoint(f"{path}: {', '.join(missing)} is missing; use an older checkpoint")
    if added := sorted(found - files.keys()):
        raise CorruptCheckpoint(
            f"{path}: {', '.join(added)} is not in the manifest; remove it if it is yours"
        )
    for name, expected in files.items():
        size, digest = _digest(path / name)
        if size != expected["bytes"]:
            raise CorruptCheckpoint(f"{path / name}: has {size} bytes, the manifest says {expected['bytes']}")
        if digest != expected["sha256"]:
            raise CorruptCheckpoint(
                f"{path / name}: its SHA-256 differs from the manifest's: damaged or altered"
            )
    step: int = manifest["step"]
    return step


def latest_valid(checkpoints: Path, *, clean: bool = False) -> Path | None:
    """The newest checkpoint below ``checkpoints`` that verifies; None if there is none.

    Each newer one that does not verify is skipped with a warning naming it and why.

    Args:
        checkpoints: The folder that holds the ``step-N`` directories; need not exist.
        clean: Also remove what killed saves left behind. Only for the process that owns the run: an
            evaluation of a running one would remove the save in progress.
    """
    if clean:
        remove_stale(checkpoints)
    for _, path in reversed(_steps(checkpoints)):
        try:
            verify(path)
        except CorruptCheckpoint as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
        else:
            return path
    return None


def read_last(checkpoints: Path) -> Path | None:
    """The checkpoint that ``last`` names (not verified); None if there is no such pointer or directory."""
    try:
        name = (checkpoints / LAST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = checkpoints / name
    return path if _STEP.fullmatch(name) and path.is_dir() else None


def forget(checkpoints: Path, after: int) -> Path | None:
    """Remove the checkpoints of more than ``after`` optimizer steps; only for the run's one writer.

    Returns:
        The newest that stays, to which ``last`` now points; None if none does.
    """
    kept = None
    for step, path in _steps(checkpoints):
        if step > after:
            _remove(path)
        else:
            kept = path
    if kept is not None:
        _point(kept)
    else:
        (checkpoints / LAST).unlink(missing_ok=True)
    return kept


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def remove_stale(checkpoints: Path) -> None:
    """Remove the hidden directories and files that killed saves left; only for the run's one writer."""
    if not checkpoints.is_dir():
        return
    for entry in list(os.scandir(checkpoints)):
        if _HIDDEN.fullmatch(entry.name):
            _delete(Path(entry.path))


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint, oldest first; nothing is verified."""
    try:
        entries = list(os.scandir(checkpoints))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{checkpoints}: the folder of checkpoints cannot be read ({error.strerror}); mend that first"
        ) from error
    matches = [(_STEP.fullmatch(entry.name), Path(entry.path)) for entry in entries]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of ``path``, checked for form and against its own hash."""
    if not stat.S_ISDIR(_lstat(path).st_mode):
        raise CorruptCheckpoint(f"{path}: not a directory; a checkpoint is a directory with a {MANIFEST}")
    with _open(path / MANIFEST) as file:
        raw = file.read(_MANIFEST_LIMIT + 1)
    try:
        manifest = json.loads(raw)
        # Only the very bytes that _manifest_text writes are accepted, so a flip in a space is found too.
        altered = raw != _manifest_text(manifest["step"], manifest["files"], manifest["format"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path / MANIFEST}: not readable as a manifest: truncated or altered"
        ) from error
    if altered:
        raise CorruptCheckpoint(f"{path / MANIFEST}: differs from its own SHA-256: damaged or altered")
    if manifest["format"] != FORMAT:
        raise CorruptCheckpoint(
            f"{path}: format {manifest['format']!r}, this version reads {FORMAT}; use the one that wrote it"
        )
    _check_names(path, manifest)
    return dict(manifest)


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    well_formed = type(manifest["step"]) is int and isinstance(manifest["files"], dict)
    if not well_formed or TRAINER not in manifest["files"]:
        raise CorruptCheckpoint(f"{path / MANIFEST}: lists no {TRAINER}")
    for name, expected in manifest["files"].items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise CorruptCheckpoint(
                f"{path / MANIFEST}: file name {name!r} is refused; only plain names are allowed"
            )
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise CorruptCheckpoint(f"{path / MANIFEST}: entry of {name!r} has not just 'bytes' and 'sha256'")


def _manifest_text(step: Any, files: Any, version: Any = FORMAT) -> str:
    body = {"format": version, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _digest(path: Path) -> tuple[int, str]:
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _open(path: Path) -> Any:
    """Open a regular file for reading; links, devices and unreadable files are refused."""
    if not stat.S_ISREG(_lstat(path).st_mode):
        raise CorruptCheckpoint(f"{path}: not a regular file (links are refused)")
    try:
        return path.open("rb")
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read ({error.strerror})") from error


def _lstat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError as error:
        what = "no manifest: a partial save" if path.name == MANIFEST else "does not exist"
        raise CorruptCheckpoint(f"{path}: {what}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read ({error.strerror})") from error


def _load(path: Path, map_location: Any) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (
        Exception
    ) as error:  # unpicklers of damaged or hostile bytes raise a dozen kinds; each is a refusal
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptCheckpoint(
            f"{path}: refused, more than tensors and plain containers ({reason})"
        ) from error


# --------------------------------------------------------------------------------------------------- writing


def _write(path: Path, checkpoint: dict[str, Any], bank_key: str, extra_files: ExtraFiles | None) -> None:
    """Write ``checkpoint`` as the directory ``path``, all or nothing."""
    bank = checkpoint.get(bank_key)
    rest = {key: value for key, value in checkpoint.items() if key != bank_key}
    _check_plain(checkpoint, "checkpoint")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(path, "partial")
    try:
        partial.mkdir()
        _save(rest, partial / TRAINER)
        if bank is not None:
            save_state(partial / BANK, bank)
        if extra_files is not None:
            extra_files(checkpoint, partial)
        _seal(partial, int(checkpoint["global_step"]))
        if path.exists():  # a damaged one, or a run that went back: the new save takes its place
            _remove(path)
        os.rename(partial, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _seal(directory: Path, step: int) -> None:
    """Flush all files of ``directory``, then write and flush the manifest."""
    files = {}
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if (
            not _NAME.fullmatch(entry.name)
            or not entry.is_file(follow_symlinks=False)
            or entry.name == MANIFEST
        ):
            raise ValueError(
                f"extra_files wrote {entry.name!r}: only regular files with plain names are allowed"
            )
        path = Path(entry.path)
        sync(path)
        size, digest = _digest(path)
        files[entry.name] = {"bytes": size, "sha256": digest}
    (directory / MANIFEST).write_text(_manifest_text(step, files))
    sync(directory / MANIFEST)
    sync(directory)


def _point(path: Path) -> None:
    """Let ``last`` name ``path``."""
    partial = _hidden(path.parent / LAST, "partial")
    try:
        partial.write_text(path.name + "\n")
        sync(partial)
        os.replace(partial, path.parent / LAST)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _prune(path: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest up to ``path``, and those after it.

    Later ones are the abandoned future of a run that went back to before ``path``.
    """
    checkpoints = _steps(path.parent)
    names = [other for _, other in checkpoints]
    position = names.index(path) + 1
    keep = {path, read_last(path.parent), *names[max(0, position - keep_last) : position]}
    for other in names:
        if other not in keep:
            _remove(other)


def _remove(path: Path) -> None:
    """Remove a checkpoint: out of sight in one step, so that a kill leaves no half of it in view."""
    removed = _hidden(path, "removed")
    os.rename(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


class _Output:
    """A file that remembers why a write failed: torch.save turns a full disk into a RuntimeError."""

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


def _save(value: Any, path: Path) -> None:
    with path.open("wb", buffering=1 << 20) as file:
        output = _Output(file)
        try:
            torch.save(value, output)  # type: ignore[arg-type]
        except RuntimeError as error:
            if output.error is not None:
                raise output.error from error
            raise


_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), torch.Size, torch.dtype, torch.device)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, tuple, set)


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError for what ``weights_only`` would refuse to read back: better now than at the resume."""
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
        _check_plain(key, f"key {key!r} of {where}")
        _check_plain(item, f"{where}[{key!r}]")


# ------------------------------------------------------------------------------------------------- Lightning


@dataclass
class SaveOptions:
    """What ``Trainer.save_checkpoint(path, storage_options=...)`` hands to :class:`DirectoryCheckpointIO`.

    Attributes:
        extra_files: Writes further files into the checkpoint.
        keep_last: Checkpoints kept beside ``path``; None removes none.
        on_error: Gets the OSError (disk full, quota, lost mount) of a save that failed. Without it the error
            is raised, which suits one process only: the other ranks wait in a barrier that follows.
    """

    extra_files: ExtraFiles | None = None
    keep_last: int | None = None
    on_error: Callable[[OSError], None] | None = field(default=None, repr=False)


class DirectoryCheckpointIO(CheckpointIO):
    """Lightning's way to storage: ``Trainer(plugins=[DirectoryCheckpointIO()])``.

    Saving and ``Trainer.fit(ckpt_path=directory, weights_only=True)`` then use these directories.

    Args:
        bank_key: Entry of Lightning's dict that is kept in a file of its own, ``bank.safetensors``.
    """

    def __init__(self, bank_key: str = BANK_KEY) -> None:
        self.bank_key = bank_key

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: SaveOptions | None = None
    ) -> None:
        """Write ``checkpoint`` as the directory ``path``, point ``last`` at it, remove old ones.

        Raises:
            TypeError: it holds something ``weights_only`` loading would refuse, or options of another kind.
            OSError: it cannot be written, and ``storage_options`` has no ``on_error``; nothing half is left.
        """
        options = SaveOptions() if storage_options is None else storage_options
        if not isinstance(options, SaveOptions):
            raise TypeError(f"storage_options={options!r}: a SaveOptions is needed")
        try:
            _write(Path(path), checkpoint, self.bank_key, options.extra_files)
            if _STEP.fullmatch(Path(path).name):
                _point(Path(path))
                if options.keep_last is not None:
                    _prune(Path(path), options.keep_last)
        except OSError as error:
            if options.on_error is None:
                raise
            options.on_error(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Verify the directory ``path``, then read it, to the CPU unless ``map_location`` says else.

        Raises:
            CorruptCheckpoint: see :func:`verify`; or it holds more than tensors and plain containers.
            UserError: the caller or the environment asks for unsafe loading.
        """
        if weights_only is False:
            raise UserError("weights_only=False: refused, a checkpoint could run code; drop it")
        refuse_unsafe_loading()
        path = Path(path)
        verify(path)
        where = "cpu" if map_location is None else map_location
        checkpoint = _load(path / TRAINER, where)
        if not isinstance(checkpoint, dict):
            raise CorruptCheckpoint(
                f"{path / TRAINER}: holds a {type(checkpoint).__name__}, a dict is needed"
            )
        if (path / BANK).exists():
            try:
                checkpoint[self.bank_key] = read_state(path / BANK)
            except ValueError as error:
                raise CorruptCheckpoint(str(error)) from error
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the directory ``path`` if it exists."""
        if Path(path).is_dir():
            _remove(Path(path))


def refuse_unsafe_loading() -> None:
    """Raise UserError if the environment tells torch.load to run pickled code."""
    if os.environ.get(_FORCE_PICKLE, "0") not in ("", "0"):
        raise UserError(
            f"{_FORCE_PICKLE}={os.environ[_FORCE_PICKLE]}: torch.load would run code from files; unset it"
        )


class SaveCheckpoint(Checkpoint):
    """Saves ``directory/step-N`` while training, through the trainer's :class:`DirectoryCheckpointIO`.

    As a ``Checkpoint`` it runs after all other callbacks of a hook, but *before* the module's own
    ``on_train_batch_end``: what must be in the checkpoint of a step (the bank's rows, the row of metrics.csv)
    is written by then, e.g. in ``optimizer_step`` or another callback. A failing disk is reported once and
    training goes on. All ranks call the same saves; only rank 0 writes.

    Args:
        directory: The run's ``checkpoints`` folder.
        every_steps: Optimizer steps between saves; None saves at the end of each epoch. The end of training
            is always saved.
        keep_last: Checkpoints kept, 1 or more.
        extra_files: Writes further files, e.g. ``encoder.safetensors``.
        in_doubt: Whether the weights may have diverged; a save that is due then waits for the first step
            after which they are not, so that no bad checkpoint takes the place of a good one.

    Attributes:
        step: Optimizer step of the newest save, 0 before the first; survives a resume.
    """

    def __init__(
        self,
        directory: Path,
        every_steps: int | None = None,
        keep_last: int = 2,
        extra_files: ExtraFiles | None = None,
        in_doubt: Callable[[], bool] = lambda: False,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: allowed is 1 or more")
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.step = 0
        self._in_doubt, self._postponed = in_doubt, False
        self._warned = False
        self._options = SaveOptions(extra_files, keep_last, self._report)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer that would save elsewhere; remove what a killed save left."""
        if not isinstance(trainer.strategy.checkpoint_io, DirectoryCheckpointIO):
            raise ValueError("SaveCheckpoint needs Trainer(plugins=[DirectoryCheckpointIO()])")
        if trainer.is_global_zero:
            remove_stale(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let ``last`` name what was resumed from: a kill may come between a save and its pointer."""
        resumed = self.directory / f"step-{self.step}"
        if trainer.is_global_zero and resumed.is_dir() and read_last(self.directory) != resumed:
            _point(resumed)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step already is; call it on all ranks, between optimizer steps."""
        if trainer.global_step == self.step:
            return
        # Set first, as it is saved too, and kept if the save fails: the ranks other than 0 do not hear of a
        # failure, and a second try at the same step on rank 0 alone would leave it waiting for them.
        self.step = trainer.global_step
        with off_the_clock(trainer):
            trainer.save_checkpoint(self.directory / f"step-{self.step}", storage_options=self._options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every ``every_steps`` optimizer steps, or after the last batch of an epoch."""
        # Not in on_train_epoch_end: Lightning does not give a loader its state back when resumed from there.
        # While gradients accumulate global_step stands still, and save() does nothing for a step it has.
        due = (
            trainer.is_last_batch if self.every_steps is None else trainer.global_step % self.every_steps == 0
        )
        wanted = due or self._postponed
        self._postponed = wanted and self._in_doubt()
        if wanted and not self._postponed:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The step, for the resume."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know the step that was resumed from as saved."""
        self.step = int(state_dict["step"])

    def _report(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.directory}/step-{self.step}: saving failed ({error.strerror or error}); training "
                "goes on, older checkpoints stay. Free some space: later saves try again, without a word",
                stacklevel=2,
            )


def is_preempted(trainer: Trainer) -> bool:
    """Whether training stopped for a signal, so that what can be left out now should be."""
    return any(isinstance(each, Preemption) and each.stopped_by for each in trainer.callbacks)  # type: ignore[attr-defined]


class Preemption(Checkpoint):
    """Saves and stops at the end of the optimizer step in which any rank gets SIGTERM, SIGUSR1 or SIGINT.

    A handler only sets a flag: saving inside one can hang in a collective. While training, the handlers
    replace Lightning's, whose SIGTERM handler broadcasts and whose SLURM requeue saves on the spot; give it
    ``SLURMEnvironment(auto_requeue=False)`` so that no save happens in the moment before either. Training in
    another thread than the main one leaves the handlers alone.

    Args:
        save: Does the saving.

    Attributes:
        stopped_by: ``"SIGTERM"``, ``"SIGUSR1"`` or ``"SIGINT"`` once training stopped for it, whichever rank
            got it, else None. The command line then exits with 75.
    """

    def __init__(self, save: SaveCheckpoint) -> None:
        self.stopped_by: str | None = None
        self._save = save
        self._step = 0
        self._received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning has installed its own handlers just before."""
        self.stopped_by, self._received, self._step = None, None, trainer.global_step
        self._previous = take_over(self._flag)
        if trainer.received_sigterm:  # in the moment before: Lightning would exit without saving
            self._received = "SIGTERM"
            trainer._signal_connector.received_sigterm = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Over the network of the hosts: on the devices, reading the answer would wait for the whole step.
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, save and stop if any rank is flagged."""
        if trainer.global_step == self._step:
            return  # gradients accumulate: the step is not complete
        self._step = trainer.global_step
        self.stopped_by = self._on_any_rank()
        if self.stopped_by is not None:
            self._save.save(trainer)
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = None  # either would go on regardless
            trainer.fit_loop.epoch_loop.min_steps = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand the signals back."""
        self._restore()

    def _flag(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT] or signal.default_int_handler)

    def _on_any_rank(self) -> str | None:
        """The signal that some rank got; of several the last of SIGNALS."""
        if self._group is None:
            return self._received
        place = -1 if self._received is None else SIGNALS.index(self._received)
        flag = torch.tensor([place], dtype=torch.int32)
        note_entry()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return None if flag.item() < 0 else SIGNALS[int(flag.item())]

    def _restore(self) -> None:
        hand_back(self._previous)
        self._previous = {}

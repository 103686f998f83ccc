"""Lightning's CheckpointIO plugin: write its checkpoint dict as a directory, and read it back."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from contrastive.checkpoint import folder, plain
from contrastive.checkpoint.integrity import TRAINER, CorruptCheckpoint, seal, verify
from contrastive.config import UserError
from memory_bank.replacing import sync
from memory_bank.state import BANK, read_state, save_state

_MINER = "miner"  # the entry of Lightning's dict that is saved in a separate file


@dataclass
class SaveOptions:
    """Options of :class:`DirectoryCheckpointIO`: ``Trainer.save_checkpoint(path, storage_options=...)``.

    Attributes:
        extra_files: Writes further files into the directory being saved, which it is called with.
        keep_last: Number of checkpoints to keep, ``path`` included; None removes none.
        on_error: Called with the OSError (disk full, quota, lost mount) of a failed save. Without it the
            error is raised, which suits a single process only: other ranks would wait in the next barrier.
    """

    extra_files: Callable[[Path], None] | None = None
    keep_last: int | None = None
    on_error: Callable[[OSError], None] | None = field(default=None, repr=False)


class DirectoryCheckpointIO(CheckpointIO):
    """CheckpointIO that stores checkpoints as directories: ``Trainer(plugins=[DirectoryCheckpointIO()])``.

    To load one: ``Trainer.fit(ckpt_path=directory, weights_only=True)``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: SaveOptions | None = None
    ) -> None:
        """Write ``checkpoint`` as the directory ``path``, point ``last`` at it, remove old ones.

        Raises:
            TypeError: it contains an object that ``weights_only`` loading refuses, or wrong options.
            OSError: it cannot be written, and ``storage_options`` has no ``on_error``; no partial checkpoint
                is left.
        """
        options = SaveOptions() if storage_options is None else storage_options
        if not isinstance(options, SaveOptions):
            raise TypeError(f"storage_options={options!r}: a SaveOptions is needed")
        try:
            _write(Path(path), checkpoint, options.extra_files)
            if folder.STEP.fullmatch(Path(path).name):
                folder.set_last(Path(path))
                if options.keep_last is not None:
                    folder.prune(Path(path), options.keep_last)
        except OSError as error:
            if options.on_error is None:
                raise
            options.on_error(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Verify the directory ``path``, then read it, to ``map_location`` or else the CPU.

        Raises:
            CorruptCheckpoint: see :func:`verify`; or it contains more than tensors and plain containers.
            UserError: the caller asks for unsafe loading.
        """
        if weights_only is False:
            raise UserError("weights_only=False: refused, a checkpoint could run code; drop it")
        path = Path(path)
        verify(path)
        device = "cpu" if map_location is None else map_location
        checkpoint = plain.load(path / TRAINER, device)
        if not isinstance(checkpoint, dict):
            raise CorruptCheckpoint(
                f"{path / TRAINER}: holds a {type(checkpoint).__name__}, a dict is needed"
            )
        if (path / BANK).exists():
            try:
                checkpoint[_MINER] = read_state(path / BANK)
            except ValueError as error:
                raise CorruptCheckpoint(str(error)) from error
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the directory ``path`` if it exists."""
        if Path(path).is_dir():
            folder.remove(Path(path))


def _write(path: Path, checkpoint: dict[str, Any], extra_files: Callable[[Path], None] | None) -> None:
    """Write ``checkpoint`` as the directory ``path``, all or nothing."""
    bank = checkpoint.get(_MINER)
    rest = {key: value for key, value in checkpoint.items() if key != _MINER}
    plain.check_plain(checkpoint, "checkpoint")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.hidden(path, "partial")
    try:
        partial.mkdir()
        plain.save(rest, partial / TRAINER)
        if bank is not None:
            save_state(partial / BANK, bank)
        if extra_files is not None:
            extra_files(partial)
        seal(partial, int(checkpoint["global_step"]))
        if path.exists():  # a damaged one, or the run resumed from an earlier step: replace it
            folder.remove(path)
        os.rename(partial, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

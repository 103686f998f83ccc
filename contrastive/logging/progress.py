"""The progress bar."""

import contextlib
import importlib.util
import sys
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar


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

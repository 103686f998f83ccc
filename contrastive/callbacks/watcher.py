"""Log each warning about a run once when it begins, and once more at the end of the run if it still holds."""

import logging
from typing import Any

import pytorch_lightning as pl

from contrastive.callbacks.preemption import is_preempted
from contrastive.lightning_glue import StepCallback
from contrastive.logging.wandb_logger import alert

logger = logging.getLogger(__name__)


class Watcher(StepCallback):
    """Base of the callbacks that warn of a run that does not learn; a warning is also a W&B alert.

    Attributes:
        standing: The warnings that hold now, by their titles; ``summary.json`` has those of the end.
    """

    def __init__(self) -> None:
        self.standing: dict[str, str] = {}
        self._said: list[str] = []
        self._begun: set[tuple[int, str]] = set()

    def set_warning(self, trainer: pl.Trainer, title: str, text: str | None) -> None:
        """Begin, update or (None) end the warning ``title``; log it if it is the first of this title."""
        if text is None:
            self.standing.pop(title, None)
            return
        self.standing[title] = text
        if title not in self._said:
            self._said.append(title)
            self._begun.add((trainer.global_step, text))
            logger.warning("%s", text)
            alert(trainer, title, text)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the warnings that still hold, unless a signal stopped the run, since it is continued then.

        What was logged first in the last step is not repeated.
        """
        if not is_preempted(trainer):
            for text in self.standing.values():
                if (trainer.global_step, text) not in self._begun:
                    logger.warning("at the end of the run: %s", text)

    def state_dict(self) -> dict[str, Any]:
        """Return the titles that were logged, so that a resumed run does not log them again."""
        return {"said": self._said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the titles that were logged."""
        self._said = list(state_dict["said"])


def standing_warnings(trainer: pl.Trainer) -> list[str]:
    """Return the warnings that hold now, of all callbacks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    return [text for each in callbacks if isinstance(each, Watcher) for text in each.standing.values()]

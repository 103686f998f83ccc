"""The pictures of a run on W&B: views, the gallery of hard negatives, the map of the bank."""

import csv
from itertools import groupby
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from contrastive.callbacks.pictures import picture_due, read_or_none
from contrastive.data.sources import Images
from contrastive.lightning_glue import StepCallback
from contrastive.logging.drawing import strip
from contrastive.logging.wandb_logger import log_media, wandb_run
from contrastive.module import ContrastiveModule

_COLUMNS: list[str | int] = ["anchor", "negative", "similarity", "same label"]


class WandbPictures(StepCallback):
    """Sends views.png once, the gallery of mined.csv and bank.png whenever the latter is drawn anew.

    At the end also mined.csv as a table, to search for files in.

    Runs after :class:`Pictures`, whose files these are. Does nothing without W&B.

    Args:
        images: The training images.
        run_dir: Where the files are.
    """

    def __init__(self, images: Images, run_dir: Path) -> None:
        self.images, self.run_dir = images, run_dir

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the views of a run that begins."""
        super().on_train_start(trainer, pl_module)
        file = self.run_dir / "views.png"
        if trainer.global_step == 0 and wandb_run(trainer.loggers) is not None and file.is_file():
            log_media(trainer, {"views/grid": _image(str(file), "images above their two views")})

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Send the rest when it is new."""
        if wandb_run(trainer.loggers) is None:
            return
        if picture_due(trainer, module, step):
            log_media(trainer, self._media(last=step in (trainer.max_steps, module.plan.total_steps)))

    def _media(self, last: bool) -> dict[str, Any]:
        import wandb

        media: dict[str, Any] = {}
        if (self.run_dir / "bank.png").is_file():
            caption = "the bank's keys along their first two principal components"
            media["bank/map"] = _image(str(self.run_dir / "bank.png"), caption)
        if (self.run_dir / "mined.csv").is_file():
            with (self.run_dir / "mined.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            anchors = [list(found) for _, found in groupby(rows, key=lambda row: row["anchor_row"])]
            drawn = map(self._strip, anchors)
            media["mining/gallery"] = [picture for picture in drawn if picture is not None]
            if last:  # W&B keeps each table as an artifact: one a run is enough
                media["mining/hardest"] = wandb.Table(_COLUMNS, data=[self._line(row) for row in rows])
        return media

    def _strip(self, found: list[dict[str, str]]) -> Any:
        """A query and its negatives as one picture; None where the query cannot be read."""
        wanted = [int(found[0]["anchor_row"]), *(int(row["negative_row"]) for row in found)]
        read = [read_or_none(self.images, row) for row in wanted]
        if read[0] is None:
            return None
        nothing = torch.full_like(read[0], 128)
        same = [False, *map(self._same_label, found)]
        lines = [found[0]["anchor_key"]]
        lines += [
            f"{row['similarity']} {row['negative_key']}{' (same label)' if framed else ''}"
            for row, framed in zip(found, same[1:], strict=True)
        ]
        drawn = strip([nothing if image is None else image for image in read], same)
        return _image(drawn.permute(1, 2, 0).numpy(), "\n".join(lines))

    def _line(self, row: dict[str, str]) -> list[Any]:
        return [row["anchor_key"], row["negative_key"], float(row["similarity"]), self._same_label(row)]

    def _same_label(self, row: dict[str, str]) -> bool:
        labels = self.images.labels
        if labels is None:
            return False
        first, second = labels[int(row["anchor_row"])], labels[int(row["negative_row"])]
        return bool(first == second) and bool(first >= 0)


def _image(content: Any, caption: str) -> Any:
    import wandb

    return wandb.Image(content, caption=caption)

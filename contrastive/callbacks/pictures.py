"""What the network is shown, and what it finds hard: views.png and mined.csv."""

import csv
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.utils import save_image

from contrastive.augment.views import center_view
from contrastive.callbacks.steps import StepCallback
from contrastive.data.sources import Images, Unreadable
from contrastive.module import ContrastiveModule, Mined


class Pictures(StepCallback):
    """Writes views.png (an image above its two views) at the start, mined.csv at the end of each epoch.

    mined.csv lists negatives that the last step really used.

    Args:
        images: The training images.
        run_dir: Where the files go.
        anchors: Images shown, and queries listed.
        negatives: Negatives listed for each query, the most similar first.
    """

    def __init__(self, images: Images, run_dir: Path, anchors: int, negatives: int = 8) -> None:
        self.images, self.run_dir, self.anchors, self.negatives = images, run_dir, anchors, negatives

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the views once."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, ContrastiveModule)
        if trainer.is_global_zero and not (self.run_dir / "views.png").exists():
            self._draw_views(pl_module)

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Refresh mined.csv at the last step of an epoch, and of the run."""
        last_of_epoch = step % module.plan.steps_per_epoch == 0
        if (
            trainer.is_global_zero
            and module.last is not None
            and (last_of_epoch or step == trainer.max_steps)
        ):
            self._write_mined(module.last)

    def _draw_views(self, module: ContrastiveModule) -> None:
        wanted = torch.linspace(0, len(self.images) - 1, min(self.anchors, len(self.images))).long()
        shown = {row: image for row in wanted.tolist() if (image := _read(self.images, row)) is not None}
        if not shown:
            return
        data, device = module.config.data, module.device
        images, ids = torch.stack(list(shown.values())).to(device), torch.tensor(list(shown)).to(device)
        views = torch.cat([center_view(images, data), *module.views(images, ids, 0)])
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))
        save_image((views * std + mean).clamp(0, 1).cpu(), self.run_dir / "views.png", nrow=len(ids))

    def _write_mined(self, mined: Mined) -> None:
        found = hardest(mined, self.anchors, self.negatives)
        staged = self.run_dir / ".mined.csv.part"
        with staged.open("w", newline="") as file:
            writer = csv.writer(file)
            header = ["anchor_row", "anchor_key", "rank", "negative_row", "negative_key", "similarity"]
            writer.writerow(header)
            for anchor, rank, row, similarity in found:
                keys = self.images.key(anchor), self.images.key(row)
                writer.writerow([anchor, keys[0], rank, row, keys[1], f"{similarity:.4f}"])
        staged.replace(self.run_dir / "mined.csv")


def hardest(mined: Mined, anchors: int, negatives: int) -> list[tuple[int, int, int, float]]:
    """(anchor row, rank, negative row, similarity) of the most similar negatives of the first queries."""
    query, used = mined.query[:anchors], mined.negatives
    similarity = torch.einsum("bd,bkd->bk", query, used.hard[:anchors]) + used.hard_log_weight[:anchors]
    ids = used.hard_ids[:anchors]
    if not ids.shape[1]:
        # Every row is a negative: the listed ones are the closest of them. A log-weight is a mask here.
        similarity = query @ used.shared.T
        similarity = similarity.masked_fill(used.shared_log_weight[:anchors] == -torch.inf, -torch.inf)
        ids = used.shared_ids.expand(len(query), -1)
    similarity, place = similarity.topk(min(negatives, ids.shape[1]), dim=1)
    rows: Tensor = ids.gather(1, place)
    return [
        (anchor, rank, row, score)
        for anchor, found, scores in zip(
            mined.ids[:anchors].tolist(), rows.tolist(), similarity.tolist(), strict=True
        )
        for rank, (row, score) in enumerate(zip(found, scores, strict=True))
        if row >= 0 and score > -torch.inf
    ]


def _read(images: Images, row: int) -> Tensor | None:
    try:
        return images.read(row)
    except Unreadable:
        return None

"""What the network is shown, and what it finds hard: views.png, mined.csv and bank.png."""

import csv
import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from contrastive.augment.views import Views, center_view
from contrastive.data.sources import Images, Unreadable
from contrastive.lightning_glue import StepCallback, log_row
from contrastive.logging.drawing import draw_map, principal_plane
from contrastive.logging.throughput import off_the_clock
from contrastive.module import ContrastiveModule, LastBatch
from contrastive.objectives.logits import own_similarity
from memory_bank.replacing import replacing

_TIMES = 20  # maps of the bank in a run: enough to see it unfold
_MOST_POINTS = 2000


class Pictures(StepCallback):
    """Writes views.png (an image above its two views) at the start, mined.csv at the end of each epoch.

    mined.csv lists negatives that the last step really used. At every twentieth part of the run bank.png, a
    map of the bank's keys, and ``views/*`` of the images in views.png follow.

    Args:
        images: The training images.
        run_dir: Where the files go.
        anchors: Images shown, and queries listed.
        negatives: Negatives listed for each query, the most similar first.
    """

    def __init__(self, images: Images, run_dir: Path, anchors: int, negatives: int = 8) -> None:
        self.images, self.run_dir, self.anchors, self.negatives = images, run_dir, anchors, negatives
        self._shown: dict[int, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the views once."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, ContrastiveModule)
        if trainer.is_global_zero and not (self.run_dir / "views.png").exists():
            self._draw_views(pl_module)

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Refresh mined.csv at the last step of an epoch, and of the run; the map when it is due."""
        if not trainer.is_global_zero:
            return
        due = picture_due(trainer, module, step)
        if module.last is not None and (due or step % module.plan.steps_per_epoch == 0):
            self._write_mined(module.last)
        if due:
            with off_the_clock(trainer):
                log_row(trainer, self._measure_views(module, step) | module.progress())
                self._draw_bank(module, step)

    def _draw_views(self, module: ContrastiveModule) -> None:
        if not self._sample():
            return
        data, device = module.config.data, module.device
        images, ids = self._batch(device)
        views = torch.cat([center_view(images, data), *_views_of(module)(images, ids, 0)[:2]])
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))
        save_image((views * std + mean).clamp(0, 1).cpu(), self.run_dir / "views.png", nrow=len(ids))

    def _measure_views(self, module: ContrastiveModule, step: int) -> dict[str, float | Tensor]:
        """``views/*``: how far the views of an image are apart, seen from how far images are."""
        if len(self._sample()) < 2:
            return {}
        images, ids = self._batch(module.device)
        first, second = _views_of(module)(images, ids, module.plan.epoch_of(step - 1))[:2]
        own = (first - second).square().mean()
        others = (first - second.roll(1, 0)).square().mean()
        return {"views/distance": own / others, "views/std": torch.cat([first, second]).std()}

    def _sample(self) -> dict[int, Tensor]:
        """Images spread evenly over the rows; those that can be read."""
        if self._shown is None:
            wanted = torch.linspace(0, len(self.images) - 1, min(self.anchors, len(self.images))).long()
            read = {row: read_or_none(self.images, row) for row in wanted.tolist()}
            self._shown = {row: image for row, image in read.items() if image is not None}
        return self._shown

    def _batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shown = self._sample()
        return torch.stack(list(shown.values())).to(device), torch.tensor(list(shown)).to(device)

    def _draw_bank(self, module: ContrastiveModule, step: int) -> None:
        bank = module.miner.bank
        slots = bank.admissible(step).nonzero()[:, 0]
        slots = slots[:: math.ceil(len(slots) / _MOST_POINTS) or 1]
        if len(slots) < 3:
            return
        # Of a sharded bank, rank 0's rows: the others do not wait for it here.
        ids, labels = bank.id[slots].cpu(), self.images.labels
        points = principal_plane(bank.local.read(slots).float().cpu())
        drawn = draw_map(points, None if labels is None else labels[ids], self.images.classes or ())
        with replacing(self.run_dir / "bank.png") as partial:
            Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(partial, format="png")

    def _write_mined(self, mined: LastBatch) -> None:
        found = hardest(mined, self.anchors, self.negatives)
        with replacing(self.run_dir / "mined.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            header = ["anchor_row", "anchor_key", "rank", "negative_row", "negative_key", "similarity"]
            writer.writerow(header)
            for anchor, rank, row, similarity in found:
                keys = self.images.key(anchor), self.images.key(row)
                writer.writerow([anchor, keys[0], rank, row, keys[1], f"{similarity:.4f}"])


def _views_of(module: ContrastiveModule) -> Views:
    """The module's own, not compiled: that is done for the batch of the first call, which must be the step's.

    A second size of batch has torch compile anew, for any size, and that is slower in every step.
    """
    return Views(module.config.augment, module.config.data, module.config.run.seed)


def picture_due(trainer: pl.Trainer, module: ContrastiveModule, step: int) -> bool:
    """Whether ``step`` ends one of about twenty parts of the run (whole epochs), or the run."""
    plan = module.plan
    if step in (trainer.max_steps, plan.total_steps):
        return True
    return step % (plan.steps_per_epoch * math.ceil(plan.epochs / _TIMES)) == 0


def hardest(mined: LastBatch, anchors: int, negatives: int) -> list[tuple[int, int, int, float]]:
    """(anchor row, rank, negative row, similarity) of the most similar negatives of the first queries."""
    query, used = mined.query[:anchors], mined.negatives
    similarity = own_similarity(query, used.hard, used.hard_index[:anchors]) + used.hard_log_weight[:anchors]
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


def read_or_none(images: Images, row: int) -> Tensor | None:
    """The image, None where it cannot be read."""
    try:
        return images.read(row)
    except Unreadable:
        return None

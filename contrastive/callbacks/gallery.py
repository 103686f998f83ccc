"""Draw pictures of a run: views.png, mined.csv and bank.png in the run directory, and the same on W&B."""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from contrastive.augment.boxes import DrawBoxes
from contrastive.augment.moments import DrawMoments
from contrastive.augment.views import Views, center_view
from contrastive.data.clips import draw_clips
from contrastive.data.crops import draw_crops
from contrastive.data.images import Images, read_or_none, spread_rows
from contrastive.drawing.figures import scatter
from contrastive.drawing.images import still, strip
from contrastive.drawing.projection import principal_components
from contrastive.lightning_glue import StepCallback, log_row
from contrastive.logging.hard_negatives import HardNegative, write_mined
from contrastive.logging.throughput import off_the_clock
from contrastive.logging.wandb_logger import log_media, wandb_run
from contrastive.module import ContrastiveModule, LastBatch
from contrastive.objectives.logits import own_similarity
from memory_bank.replacing import replacing

_TIMES = 20  # maps of the bank in a run, enough to see how it changes
_MOST_POINTS = 2000
_COLUMNS: list[str | int] = ["anchor", "negative", "similarity", "same label"]


class Gallery(StepCallback):
    """Writes views.png (an image above its two views) at the start, mined.csv at the end of each epoch.

    A clip and its views are three strips of frames, one below the other.

    mined.csv lists negatives that the last step really used. About twenty times in a run it also writes
    bank.png, a map of the bank's keys, logs ``views/*`` of the images in views.png, and sends the map and the
    hard negatives to W&B as pictures; at the end also as a table, which can be searched for files.

    Args:
        images: The training images.
        run_dir: Folder of the files.
        anchors: Number of images to show and of queries to list.
        negatives: Number of negatives to list for each query, the most similar first.
    """

    def __init__(self, images: Images, run_dir: Path, anchors: int, negatives: int = 8) -> None:
        self.images, self.run_dir, self.anchors, self.negatives = images, run_dir, anchors, negatives
        self._shown: dict[int, Tensor] | None = None
        self._mined: list[HardNegative] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the views, unless they exist, and send them to W&B when the run begins."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, ContrastiveModule)
        file = self.run_dir / "views.png"
        if trainer.is_global_zero and not file.exists():
            self._draw_views(pl_module)
        if trainer.global_step == 0 and wandb_run(trainer.loggers) is not None and file.is_file():
            log_media(trainer, {"views/grid": _image(str(file), _caption(self.images))})

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Write mined.csv at the last step of an epoch and of the run; draw pictures when they are due."""
        if not trainer.is_global_zero:
            return
        due = picture_due(trainer, module, step)
        if module.last is not None and (due or step % module.plan.steps_per_epoch == 0):
            self._mined = self._hardest(module.last)
            write_mined(self.run_dir / "mined.csv", self._mined)
        if due:
            with off_the_clock(trainer, "pictures", _picture_every(module)):
                log_row(trainer, self._measure_views(module, step) | module.progress())
                drawn = self._draw_bank(module, step)
            if wandb_run(trainer.loggers) is not None:
                last = step in (trainer.max_steps, module.plan.total_steps)
                log_media(trainer, self._media(drawn, last))

    def _draw_views(self, module: ContrastiveModule) -> None:
        if not self._sample():
            return
        data, device = module.config.data, module.device
        centre = center_view(torch.stack(list(self._sample().values())).to(device), data)
        drawn = [centre[:, : data.frames] if self.images.frames else centre, *self._views(module, 0)]
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))
        pixels = [_as_large((views * std + mean).clamp(0, 1).cpu(), data.image_size) for views in drawn]
        columns = len(centre)
        if self.images.frames:
            pixels, columns = [*torch.stack(pixels, dim=1).flatten(0, 1)], data.frames
        save_image(torch.cat(pixels), self.run_dir / "views.png", nrow=columns)

    def _measure_views(self, module: ContrastiveModule, step: int) -> dict[str, float | Tensor]:
        """Measure ``views/*``: the distance between two views of an image over that between images."""
        if len(self._sample()) < 2:
            return {}
        first, second = self._views(module, module.plan.epoch_of(step - 1))
        own = (first - second).square().mean()
        others = (first - second.roll(1, 0)).square().mean()
        return {"views/distance": own / others, "views/std": torch.cat([first, second]).std()}

    def _sample(self) -> dict[int, Tensor]:
        """Read images spread evenly over the rows; those that cannot be read are left out."""
        if self._shown is None:
            wanted = spread_rows(len(self.images), self.anchors).tolist()
            read = {row: read_or_none(self.images, row) for row in wanted}
            self._shown = {row: image for row, image in read.items() if image is not None}
        return self._shown

    def _views(self, module: ContrastiveModule, epoch: int) -> tuple[Tensor, ...]:
        """Return the two views of each image that is shown, as the module's, but not compiled.

        torch compiles for the batch size of the first call, which must be the step's; after a second size it
        would recompile for any size, which makes every step slower.
        """
        config, shown = module.config, self._sample()
        images, ids = torch.stack(list(shown.values())), torch.tensor(list(shown))
        moments = DrawMoments(config.augment.time, config.run.seed)
        boxes = DrawBoxes(config.augment, config.data, config.run.seed)
        drawn = draw_crops(draw_clips(self.images, config.data, moments), config.data, boxes, boxes.sides)
        if drawn is not self.images:  # training sees other clips and crops than evaluation
            images = torch.stack([drawn.in_epoch(epoch).read(row) for row in shown])
        views = Views(config.augment, config.data, config.run.seed)
        return views(images.to(module.device), ids.to(module.device), epoch)[:2]

    def _draw_bank(self, module: ContrastiveModule, step: int) -> Tensor | None:
        bank = module.miner.bank
        slots = bank.admissible(step).nonzero()[:, 0]
        slots = slots[:: math.ceil(len(slots) / _MOST_POINTS) or 1]
        if len(slots) < 3:
            return None
        # Only rank 0's rows of a sharded bank: gathering the others would be a collective.
        ids, labels = bank.id[slots].cpu(), self.images.labels
        points = principal_components(bank.local.read(slots).float().cpu())
        shown = None if labels is None else labels[ids]
        drawn = scatter(points, shown, self.images.classes or (), "map of the bank", legend=True).pixels()
        with replacing(self.run_dir / "bank.png") as partial:
            Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(partial, format="png")
        return drawn

    def _hardest(self, mined: LastBatch) -> list[HardNegative]:
        return [
            HardNegative(anchor, self.images.key(anchor), rank, row, self.images.key(row), round(score, 4))
            for anchor, rank, row, score in hardest(mined, self.anchors, self.negatives)
        ]

    def _media(self, bank: Tensor | None, last: bool) -> dict[str, Any]:
        """Pictures for W&B; the table only at the end, as W&B keeps each one as an artifact."""
        import wandb

        media: dict[str, Any] = {}
        if bank is not None:
            caption = "the bank's keys along their first two principal components"
            media["bank/map"] = _image(bank.permute(1, 2, 0).numpy(), caption)
        if self._mined:
            groups = groupby(self._mined, key=lambda row: row.anchor_row)
            strips = (self._strip(list(found)) for _, found in groups)
            media["mining/gallery"] = [picture for picture in strips if picture is not None]
            if last:
                lines = [
                    [row.anchor_key, row.negative_key, row.similarity, row.same_label(self.images.labels)]
                    for row in self._mined
                ]
                media["mining/hardest"] = wandb.Table(_COLUMNS, data=lines)
        return media

    def _strip(self, found: list[HardNegative]) -> Any:
        """Draw a query and its negatives as one picture; None where the query cannot be read."""
        rows = [found[0].anchor_row, *(row.negative_row for row in found)]
        read = [read_or_none(self.images, row) for row in rows]
        images = [None if image is None else still(image) for image in read]
        if images[0] is None:
            return None
        nothing = torch.full_like(images[0], 128)
        same = [row.same_label(self.images.labels) for row in found]
        lines = [found[0].anchor_key]
        lines += [
            f"{row.similarity:.4f} {row.negative_key}{' (same label)' if framed else ''}"
            for row, framed in zip(found, same, strict=True)
        ]
        drawn = strip([nothing if image is None else image for image in images], [False, *same])
        return _image(drawn.permute(1, 2, 0).numpy(), "\n".join(lines))


def _caption(images: Images) -> str:
    return "clips above their two views" if images.frames else "images above their two views"


def picture_due(trainer: pl.Trainer, module: ContrastiveModule, step: int) -> bool:
    """Return whether ``step`` ends one of about twenty parts of the run (whole epochs), or the run."""
    plan = module.plan
    if step in (trainer.max_steps, plan.total_steps):
        return True
    return step % _picture_every(module) == 0


def _picture_every(module: ContrastiveModule) -> int:
    an_epoch = module.plan.steps_per_epoch
    return an_epoch * math.ceil(module.plan.total_steps / an_epoch / _TIMES)


def hardest(mined: LastBatch, anchors: int, negatives: int) -> list[tuple[int, int, int, float]]:
    """List (anchor row, rank, negative row, similarity) of the first queries' most similar negatives.

    Of a row that is a negative twice, by both views of its image, the more similar one is listed.
    """
    query, used = mined.query[:anchors], mined.negatives
    similarity = own_similarity(query, used.hard, used.hard_index[:anchors]) + used.hard_log_weight[:anchors]
    ids = used.hard_ids[:anchors]
    if not ids.shape[1]:
        # Every row is a negative: list the closest ones. The log-weights are only a mask here.
        similarity = query @ used.shared.T
        similarity = similarity.masked_fill(used.shared_log_weight[:anchors] == -torch.inf, -torch.inf)
        ids = used.shared_ids.expand(len(query), -1)
    similarity, columns = similarity.topk(min(2 * negatives, ids.shape[1]), dim=1)
    rows: Tensor = ids.gather(1, columns)
    listed = []
    for anchor, found, scores in zip(
        mined.ids[:anchors].tolist(), rows.tolist(), similarity.tolist(), strict=True
    ):
        best: dict[int, float] = {}
        for row, score in zip(found, scores, strict=True):
            if row >= 0 and score > -torch.inf:
                best.setdefault(row, score)
        listed += [(anchor, rank, *pair) for rank, pair in enumerate(list(best.items())[:negatives])]
    return listed


def _as_large(views: Float[Tensor, "b *t 3 _ _"], size: int) -> Float[Tensor, "b *t 3 s s"]:
    """Return views of another size (``augment.global_size``) at the size of whole images, blocky."""
    if views.shape[-1] == size:
        return views
    large = F.interpolate(views.flatten(0, -4), size=(size, size), mode="nearest")
    return large.view(*views.shape[:-2], size, size)


def _image(content: Any, caption: str) -> Any:
    import wandb

    return wandb.Image(content, caption=caption)

"""Send pictures of what the encoder attends to to W&B, every few epochs."""

import logging

import pytorch_lightning as pl
from torch import Tensor

from contrastive.config import DataConfig, UserError
from contrastive.data.images import Images, spread_rows
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from contrastive.drawing.canvas import Drawing
from contrastive.encoders.encoder import Encoder
from contrastive.lightning_glue import StepCallback
from contrastive.logging.throughput import off_the_clock
from contrastive.logging.wandb_logger import log_media, wandb_run
from contrastive.module import ContrastiveModule
from eval.attention_maps import compute_maps, draw
from eval.attention_over_time import compute_weights, draw_weights, middle_clip

logger = logging.getLogger(__name__)


class AttentionPictures(StepCallback):
    """Log ``views/attention``: what ``contrastive-eval attention`` draws, of images spread over the rows.

    The encoder is in eval mode for this: training with and without this callback gives bit-identical weights.
    A network without maps (see ``attention_maps``), of clips without weights (see ``compute_weights``), is
    named in a warning, and no more pictures are drawn.

    Args:
        images: The training images.
        every: Epochs between pictures.
        count: Number of images; those that cannot be read are left out.

    """

    def __init__(self, images: Images, every: int, count: int = 8) -> None:
        self.images, self.every, self.count = images, every, count
        self._pixels: Tensor | None = None

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Draw and send the pictures that are due after this epoch."""
        due = self.every and epochs % self.every == 0
        if not due or not trainer.is_global_zero or wandb_run(trainer.loggers) is None:
            return
        import wandb

        with off_the_clock(trainer, "attention", self.every * module.plan.steps_per_epoch):
            try:
                drawn = self.draw(module)
            except UserError as error:
                logger.warning("no pictures of attention: %s", error)
                self.every = 0
                return
            pictures = [wandb.Image(pixels.permute(1, 2, 0).numpy()) for pixels in drawn]
        log_media(trainer, {"views/attention": pictures})

    def draw(self, module: ContrastiveModule) -> list[Tensor]:
        """Return the picture of each image.

        Raises:
            UserError: the network has no maps, or none of the images can be read.
        """
        if self._pixels is None:
            rows = spread_rows(len(self.images), self.count)
            self._pixels = decode_all(SomeImages(self.images, rows)).batch.images
        if not len(self._pixels):
            raise UserError(f"none of {min(self.count, len(self.images))} images can be read")
        encoder, data, training = module.encoder, module.config.data, module.encoder.training
        encoder.eval()
        try:
            drawings = _draw(encoder, self._pixels, data)
        finally:
            encoder.train(training)
        return [drawing.pixels() for drawing in drawings]


def _draw(encoder: Encoder, pixels: Tensor, data: DataConfig) -> list[Drawing]:
    if pixels.ndim == 5:
        clips = middle_clip(pixels, data)
        return draw_weights({"encoder": compute_weights(encoder, clips, data)}, clips, data)
    return draw({"encoder": compute_maps(encoder, pixels, data)}, pixels, data)

"""How good the features are, while they are made."""

import hashlib
import logging
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

from contrastive.augment.views import center_view
from contrastive.callbacks.preemption import is_preempted
from contrastive.data.images import Images, SomeImages
from contrastive.data.reading import decode_all
from contrastive.lightning_glue import StepCallback, log_row
from contrastive.logging.throughput import off_the_clock
from contrastive.module import ContrastiveModule
from eval.online import OnlineKnn, OnlineProbe

logger = logging.getLogger(__name__)


def monitor_split(images: Images, most: int = 12_000) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to score, both from the *training* part: the test part stays unseen.

    By a hash of the row's key, one in five is scored; sets larger than ``most`` are sampled by the same hash.
    """
    hashes = torch.tensor(
        [
            int.from_bytes(hashlib.sha256(images.key(row).encode()).digest()[:6], "big")
            for row in range(len(images))
        ]
    )
    rows = hashes.argsort()[:most]
    scored = hashes[rows] % 5 == 0
    return rows[~scored], rows[scored]


class OnlineScores(StepCallback):
    """kNN and linear probe, top-1 on held-out rows every few epochs, on frozen features of the query encoder.

    The encoder is in eval mode meanwhile, so its batch statistics do not move: training with and without
    this callback gives the same weights to the bit.

    Args:
        images: A labelled view of the training part.
        knn_every: Epochs between scores by kNN, 0 for none; the end of the run is scored too.
        probe_every: Likewise by the linear probe.
        batch_size: Images a forward pass.
    """

    def __init__(self, images: Images, knn_every: int, probe_every: int, batch_size: int = 256) -> None:
        assert images.labels is not None
        self.images, self.batch_size = images, batch_size
        self._every = {"knn": knn_every, "probe": probe_every}
        self._score_of: dict[str, Callable[..., float]] = {"knn": OnlineKnn(), "probe": OnlineProbe()}
        self.fit_rows, self.score_rows = monitor_split(images)
        self._decoded: dict[str, tuple[Tensor, Tensor]] = {}
        self._scored_step = dict.fromkeys(self._every, -1)

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Score, when due."""
        self._score(
            trainer, module, [name for name, every in self._every.items() if every and not epochs % every]
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the last weights, unless a signal ended it: a cluster does not wait for that."""
        assert isinstance(pl_module, ContrastiveModule)
        if not is_preempted(trainer):
            self._score(trainer, pl_module, [name for name, every in self._every.items() if every])

    def _score(self, trainer: pl.Trainer, module: ContrastiveModule, wanted: list[str]) -> None:
        """Those of ``wanted`` that this step does not have yet."""
        due = [name for name in wanted if self._scored_step[name] != trainer.global_step]
        self._scored_step |= dict.fromkeys(due, trainer.global_step)
        if not due or not trainer.is_global_zero:
            return
        with off_the_clock(trainer):
            if self._lacks_images():
                return
            fit = self._features(module, "fit", self.fit_rows)
            scored = self._features(module, "score", self.score_rows)
            row = {f"{name}/top1": self._score_of[name](*fit, *scored) for name in due}
        log_row(trainer, row | module.progress())

    def _lacks_images(self) -> bool:
        """Whether nothing can be fitted on or scored; said once, for a monitor must not stop a run."""
        parts = [self._decode("fit", self.fit_rows), self._decode("score", self.score_rows)]
        if all(len(kept) for _, kept in parts):
            return False
        logger.warning(
            "no online scores: of %d labelled images %d can be read to fit on and %d to be scored",
            len(self.images),
            *(len(kept) for _, kept in parts),
        )
        self._every = dict.fromkeys(self._every, 0)
        return True

    @torch.inference_mode()
    def _features(self, module: ContrastiveModule, part: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, kept = self._decode(part, rows)
        encoder, training = module.encoder, module.encoder.training
        encoder.eval()
        try:
            features = [
                encoder(center_view(batch.to(module.device), module.config.data)).float()
                for batch in torch.split(images, self.batch_size)
            ]
        finally:
            encoder.train(training)
        assert self.images.labels is not None
        return torch.cat(features), self.images.labels[kept].to(module.device)

    def _decode(self, part: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read once; unreadable rows are left out (the training path counts them)."""
        if part not in self._decoded:
            decoded = decode_all(SomeImages(self.images, rows)).batch
            self._decoded[part] = decoded.images, rows[decoded.ids]
        return self._decoded[part]

"""Score the features during training with kNN and a linear probe, by the code of the offline protocols."""

import hashlib
import logging
import math
import time
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.callbacks.preemption import is_preempted
from contrastive.config import UserError
from contrastive.data.arrays import DecodedImages
from contrastive.data.images import Images
from contrastive.data.plan import Plan
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from contrastive.lightning_glue import StepCallback, log_row
from contrastive.logging.throughput import off_the_clock
from contrastive.module import ContrastiveModule
from eval import knn, linear_probe
from eval.features import Features, PartFeatures, extract

logger = logging.getLogger(__name__)

_K = 20  # neighbours that vote, as in the main score of the offline protocol


def monitor_split(images: Images, most: int = 12_000) -> tuple[Tensor, Tensor]:
    """Return rows to fit on and rows to score, both from the *training* part: the test part stays unseen.

    By a hash of the row's key, one in five is scored; sets larger than ``most`` are sampled by the same hash.
    Rows of unknown class (-1) are in neither.
    """
    assert images.labels is not None
    hashes = torch.tensor(
        [
            int.from_bytes(hashlib.sha256(images.key(row).encode()).digest()[:6], "big")
            for row in range(len(images))
        ]
    )
    rows = hashes.argsort()
    rows = rows[images.labels[rows] >= 0][:most]
    scored = hashes[rows] % 5 == 0
    return rows[~scored], rows[scored]


def knn_top1(features: Features) -> float:
    """Return the kNN top-1 of ``contrastive-eval knn``; NaN if features are not finite.

    If there are fewer rows than neighbours, all of them vote: a monitor must not stop a run.
    """
    settings = knn.KnnConfig(k=[min(_K, len(features.train))])
    try:
        return knn.score(features, knn.KnnEvaluation("-", knn=settings)).lines[0].value
    except UserError:
        return math.nan


_PROBE = linear_probe.LinearEvaluation("-", linear=linear_probe.LinearConfig(widen=0))


def probe_top1(features: Features) -> float:
    """Return the top-1 of ``contrastive-eval linear``; NaN on failure: a monitor must not stop a run.

    The grid is that of the offline protocol: a smaller one is off by 1 to 2 points; this takes seconds. It
    does not grow: chosen on few images, that would move the score from one time to the next.
    """
    try:
        return linear_probe.score(features, _PROBE).lines[0].value
    except UserError:  # no class has two rows to fit on, or features are not finite
        return math.nan


_SCORES = {"knn": knn_top1, "probe": probe_top1}


@dataclass(frozen=True)
class _Part:
    """The images to fit on or to score, decoded once, with the row of each in the training part."""

    images: DecodedImages
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]

    def split(self, features: Float[Tensor, "n d"], device: torch.device) -> PartFeatures:
        return PartFeatures(features, self.labels, self.rows).to(device)


class OnlineScores(StepCallback):
    """Log top-1 by kNN and by a linear probe on held-out rows, every few epochs, from frozen features.

    The encoder before its first step is scored too, as the row of step 0, to read later scores against.

    Features are those of the query encoder, by ``eval.features.extract``. It is in eval mode for
    this, so its batch statistics do not change: training with and without this callback gives bit-identical
    weights.

    Args:
        images: Labelled training images; those of unknown class (-1) are left out.
        knn_every: Epochs between scores by kNN, 0 for none; the end of the run is scored too.
        probe_every: Epochs between scores by the linear probe, 0 for none; the end of the run is scored too.
        most_share: Largest share of a run's time that scores may take. The first and the last are computed
            even if they alone take more; then there is none between them.
        batch_size: Images per forward pass.

    Attributes:
        untrained: Scores before the first step, by their names (``knn/top1``); empty in a resumed run.
        scores: The newest scores after a step.
    """

    def __init__(
        self, images: Images, knn_every: int, probe_every: int, most_share: float = 1.0, batch_size: int = 256
    ) -> None:
        assert images.labels is not None
        self.images, self.labels, self.batch_size = images, images.labels, batch_size
        self._every = {"knn": knn_every, "probe": probe_every}
        self._most_share = most_share
        self._began, self._first_step = 0.0, 0  # of this start
        self._took_s, self._ended = 0.0, -math.inf  # the last score
        self._scored_s = 0.0  # all scores, and once the decoding of their images
        self.fit_rows, self.score_rows = monitor_split(images)
        self._parts: tuple[_Part, _Part] | None = None
        self._scored_step = dict.fromkeys(self._every, -1)
        self.untrained: dict[str, float] = {}
        self.scores: dict[str, float] = {}

    @property
    def largest_class(self) -> float:
        """Return the share of the largest class among the scored images: what always naming it scores."""
        counts = torch.unique(self.labels[self.score_rows], return_counts=True)[1]
        return int(counts.max()) / len(self.score_rows)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the encoder before its first step."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, ContrastiveModule)
        self._began, self._first_step = time.monotonic(), trainer.global_step
        if trainer.global_step == 0:
            self._score(trainer, pl_module, self._wanted())
            self.untrained, self.scores = self.scores, {}

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Compute the scores that are due after this epoch."""
        wanted = [name for name, every in self._every.items() if every and not epochs % every]
        if self._most_share == 1 or self._is_affordable(trainer.global_step, module.plan):
            self._score(trainer, module, wanted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the final weights, unless a signal stopped the run: a cluster would not wait for it."""
        assert isinstance(pl_module, ContrastiveModule)
        if not is_preempted(trainer):
            self._score(trainer, pl_module, self._wanted())

    def _is_affordable(self, step: int, plan: Plan) -> bool:
        """Return whether a score now lies apart from the one before and the last, and leaves time for it."""
        if not plan.has_end:
            return False
        now = time.monotonic()
        spent_s = now - self._began
        left_s = (spent_s - self._scored_s) / (step - self._first_step) * (plan.total_steps - step)
        apart_s = self._took_s * (1 / self._most_share - 1)
        two_s = 2 * self._took_s  # this one and the last
        is_within = self._scored_s + two_s <= self._most_share * (spent_s + left_s + two_s)
        return is_within and min(now - self._ended, left_s) >= apart_s

    def _wanted(self) -> list[str]:
        """Return the scores that are not turned off."""
        return [name for name, every in self._every.items() if every]

    def _score(self, trainer: pl.Trainer, module: ContrastiveModule, wanted: list[str]) -> None:
        """Compute and log the ``wanted`` scores, except those already logged for this step."""
        due = [name for name in wanted if self._scored_step[name] != trainer.global_step]
        last = max(self._scored_step.values())
        self._scored_step |= dict.fromkeys(due, trainer.global_step)
        if not due or not trainer.is_global_zero:
            return
        every = max(self._every[name] for name in due) * module.plan.steps_per_epoch
        with off_the_clock(trainer, "+".join(due), self._expected(every, trainer.global_step, last)):
            began = time.monotonic()
            if self._parts is None:
                self._parts = self._decode(self.fit_rows), self._decode(self.score_rows)
            if self._lacks_images(*self._parts):
                return
            decoded = time.monotonic()
            features = self._features(module, *self._parts)
            row = {f"{name}/top1": _SCORES[name](features) for name in due}
            self._ended = time.monotonic()
            self._took_s = self._ended - decoded
            self._scored_s += self._ended - began
        self.scores |= row
        log_row(trainer, row | module.progress())

    def _expected(self, every: int, step: int, last: int) -> int | None:
        """Return the steps between scores to count on; None while the time that one takes is not known."""
        if self._most_share == 1:
            return every
        return max(every, step - last) if last >= 0 else None

    def _lacks_images(self, *parts: _Part) -> bool:
        """Return whether there are no rows to fit on or to score; if so, warn and turn the scores off."""
        if all(len(part.rows) for part in parts):
            return False
        logger.warning(
            "no online scores: of %d labelled %s %d can be read to fit on and %d to be scored",
            *(len(self.images), self.images.noun),
            *(len(part.rows) for part in parts),
        )
        self._every = dict.fromkeys(self._every, 0)
        return True

    def _features(self, module: ContrastiveModule, fit: _Part, score: _Part) -> Features:
        encoder, training = module.encoder, module.encoder.training
        try:
            train, test = (part.split(self._extract(module, part), module.device) for part in (fit, score))
        finally:
            encoder.train(training)
        num_classes = 1 + int(max(part.labels.max() for part in (fit, score)))
        return Features(train, test, tuple(map(str, range(num_classes))))

    def _extract(self, module: ContrastiveModule, part: _Part) -> Tensor:
        features, _ = extract(
            module.encoder,
            part.images,
            module.config.data,
            batch_size=self.batch_size,
            num_workers=0,
            device=module.device,
        )
        return features

    def _decode(self, rows: Tensor) -> _Part:
        """Decode some rows; leave out unreadable ones, which the training path counts."""
        decoded = decode_all(SomeImages(self.images, rows)).batch
        readable = rows[decoded.ids]
        return _Part(DecodedImages("monitor", decoded.images), self.labels[readable], readable)

"""Warn of a run that does not learn: a loss that rises or is at chance, scores no better, a falling rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from contrastive.callbacks.online import OnlineScores
from contrastive.callbacks.watch_health import WatchHealth
from contrastive.callbacks.watch_mining import uses_bank
from contrastive.callbacks.watcher import Watcher
from contrastive.config import PretrainConfig
from contrastive.data.plan import Plan
from contrastive.module import ContrastiveModule

_PATIENCE = 3
"""Epochs in a row that must be bad."""

_LEAST_EPOCHS = 8
"""Losses that are needed to tell a rise from noise."""

_LEAST_SCORED = 100
"""Images in an accuracy from which on it can be called level with another: chance is 5 points at most."""

_MOST_EPOCHS = 1000
"""Epochs that are remembered: a checkpoint holds them."""

_SCORES = {
    "probe/top1": "the linear probe on held-out images, probe/top1,",
    "knn/top1": "kNN on held-out images, knn/top1,",
}
"""Online scores in words, with the names by which they are found in metrics.csv and on W&B."""


@dataclass(frozen=True)
class EpochLoss:
    """The loss of one epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean over its optimizer steps, in nats.
        negatives: Negatives of a query in its last step, mean over the queries.
        mined: Whether that step had negatives from the bank.
        side: Of its global views in pixels.
    """

    epoch: int
    loss: float
    negatives: float
    mined: bool
    side: int = 0  # 0 in checkpoints of before

    def compares_with(self, other: "EpochLoss") -> bool:
        """Return whether both had views of one size and, within 5% (0.05 nats), as many like negatives."""
        alike = (self.mined, self.side) == (other.mined, other.side)
        return alike and abs(self.negatives - other.negatives) <= 0.05 * other.negatives


def rising_loss(epochs: Sequence[EpochLoss]) -> str | None:
    """Return a warning if the last three epochs are all above the best one before them.

    Only the last epochs in a row with the same negatives and size of views compare, except the one in which
    they changed: with others the loss of a healthy run is another one. Above means by more than 0.1 nats, 5%,
    and eight standard deviations of an epoch's noise.
    """
    same = _comparable(epochs)
    if len(same) < _LEAST_EPOCHS:
        return None
    before, recent = same[:-_PATIENCE], same[-_PATIENCE:]
    best, least = min(before, key=lambda each: each.loss), min(each.loss for each in recent)
    if least - best.loss <= max(0.1, 0.05 * best.loss, 8 * _noise([each.loss for each in same])):
        return None
    last = recent[-1]
    return (
        f"the loss rises: {last.loss:.3g} in epoch {last.epoch}, {best.loss:.3g} in epoch {best.epoch}, "
        "against the same number of negatives. Lower optimizer.base_lr, or set trainer.gradient_clip_val=1"
    )


def loss_at_chance(epoch: EpochLoss) -> str | None:
    """Return a warning if InfoNCE is within 2% of ``log(1 + negatives)``, what guessing the positive costs.

    Of hard negatives nothing is said: they may be as close as the positive in a run that learns.
    """
    chance = math.log1p(epoch.negatives)
    if epoch.mined or not epoch.negatives or epoch.loss < 0.98 * chance:
        return None
    return (
        f"the loss is at chance: {epoch.loss:.3g} in epoch {epoch.epoch}, and guessing among "
        f"{epoch.negatives:.0f} negatives costs {chance:.3g}. The two views of an image are hardly closer "
        "than those of others: make them more alike (a larger augment.view_1.crop_scale, see views.png), "
        "take more steps (a smaller data.global_batch, a longer schedule), or change optimizer.base_lr"
    )


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of the noise on a smooth curve of three values or more.

    From the median of the second differences, in which a slope cancels; of independent normal noise it is
    0.6745 * sqrt(6) standard deviations.
    """
    steps = [second - first for first, second in pairwise(values)]
    return median(abs(second - first) for first, second in pairwise(steps)) / (0.6745 * 6**0.5)


def _comparable(epochs: Sequence[EpochLoss]) -> list[EpochLoss]:
    """Return the last epochs in a row that compare; without the one in which negatives or views changed."""
    start = len(epochs)
    while start and epochs[start - 1].compares_with(epochs[-1]):
        start -= 1
    return list(epochs[start + 1 if start else 0 :])


def below_untrained(
    name: str, score: float, untrained: float, rows: int, *, guessing: float = 0.0, jitter: float = 1.0
) -> str | None:
    """Return a warning if an accuracy is below that of the encoder before its first step.

    Args:
        name: Name of the score in metrics.csv.
        score: Accuracy now, in [0, 1]; NaN is no score.
        untrained: Accuracy before the first step.
        rows: Images scored; two standard errors of the difference of the two accuracies are allowed for
            chance. They are added as of unlike images, which is too much rather than too little.
        guessing: Accuracy without looking, by always naming the largest class. An untrained encoder that has
            no more told no classes apart, so there is nothing that training could remove.
        jitter: The larger ``jitter`` of the two views. At 0 they keep the brightness and colour of their
            image, which may suffice to match them.
    """
    allowed = 2 * ((untrained * (1 - untrained) + score * (1 - score)) / rows) ** 0.5
    if untrained <= guessing or not score < untrained - allowed:
        return None
    look = (
        "if the two views of an image do not show the same thing, soften augment.view_1 and view_2 "
        "(crop_scale, jitter)"
    )
    if not jitter:
        look = (
            "if brightness or colour tell which two views are of one image, set augment.view_1.jitter=0.8 "
            "and view_2's; if the two do not show the same thing, raise their crop_scale"
        )
    return (
        f"{_SCORES[name]} has {100 * score:.1f}%, the encoder before its first step had "
        f"{100 * untrained:.1f}% ({rows} images): training removes what tells the classes apart. See "
        f"views.png: {look}; otherwise lower optimizer.base_lr"
    )


def level_with_untrained(
    scores: Mapping[str, float], untrained: Mapping[str, float], rows: int
) -> str | None:
    """Return a warning if no accuracy is clearly above that of the encoder before its first step.

    Args:
        scores: Accuracies now, in [0, 1], by name in metrics.csv; NaN is no score.
        untrained: Accuracies before the first step; if one has no successor yet, there is no warning.
        rows: Images scored; clearly means by more than one standard error of the accuracy. Of fewer than 100
            nothing is said.
    """
    if rows < _LEAST_SCORED or not untrained or not untrained.keys() <= scores.keys():
        return None
    pairs = {name: (scores[name], untrained[name]) for name in untrained}
    if any(not now <= then + (then * (1 - then) / rows) ** 0.5 for now, then in pairs.values()):
        return None
    each = "; ".join(
        f"{_SCORES[name]} {100 * now:.1f}% ({100 * then:.1f}%)" for name, (now, then) in pairs.items()
    )
    return (
        "no score is clearly above (by more than one standard error) that of the encoder before its first "
        f"step (in brackets; {rows} images): {each}. By these scores nothing is learnt yet that tells the "
        "classes apart: train longer under another run.name (schedule.minutes or schedule.epochs), or make "
        "views that keep what does (augment.view_1 and view_2, see views.png)"
    )


def falling_rank(ranks: Sequence[tuple[int, float]], dim: int) -> str | None:
    """Return a warning if the effective rank was below a quarter of its maximum in the last three epochs.

    Give ranks from a quarter of the run on. Before that a healthy run falls too, since the embeddings of an
    untrained network are spread without meaning: the digits recipe from 54.0 to 17.6 of 64 in its first 25 of
    160 epochs, a factor of 3.1; afterwards its rank rises.

    Args:
        ranks: Pairs of an epoch and the effective rank of the keys after it.
        dim: Largest possible rank.
    """
    if len(ranks) <= _PATIENCE:
        return None
    at, highest = max(ranks, key=lambda pair: pair[1])
    if max(rank for _, rank in ranks[-_PATIENCE:]) >= highest / 4:
        return None
    epoch, rank = ranks[-1]
    return (
        f"the effective rank of the embeddings falls: {rank:.1f} of {dim} after epoch {epoch}, {highest:.1f} "
        f"after epoch {at}. Raise objective.temperature, lower optimizer.base_lr, or give the loss more "
        "negatives (mining.num_uniform)"
    )


def settled_after(config: PretrainConfig, plan: Plan) -> int:
    """Return the optimizer steps after which warm-up is over and the band of negatives has stopped moving."""
    warmup = config.schedule.warmup_steps(plan.steps_per_epoch, plan.total_steps)
    return max(warmup, config.mining.band_steps if config.mining.band_end is not None else 0)


class WatchLearning(Watcher):
    """Keeps the history of a run, which survives a resume, and warns by the functions of this file.

    Scores and ranks are judged after a quarter of the run (a loss at chance and scores that are level with
    the untrained encoder's after half of it), a rising loss once warm-up is over.

    Args:
        health: Measures the effective rank; called before this callback.
        online: Scores the encoder, also before the first step; called before this callback. None if scores
            are off.
    """

    def __init__(self, health: WatchHealth, online: OnlineScores | None) -> None:
        super().__init__()
        self._health, self._online = health, online
        self._losses: list[EpochLoss] = []
        self._ranks: list[tuple[int, float]] = []
        self._untrained: dict[str, float] = {}
        self._sum: Tensor | None = None

    def on_step(self, trainer: pl.Trainer, module: ContrastiveModule, step: int) -> None:
        """Add the loss of the step, if it is finite; the sum stays on the device until the epoch ends."""
        loss = module.diagnostics.get("loss")
        if trainer.is_global_zero and loss is not None:
            finite = loss.isfinite()
            added = torch.stack([torch.where(finite, loss, 0.0), finite.to(loss.dtype)]).float()
            self._sum = added if self._sum is None else self._sum + added

    def on_epoch(self, trainer: pl.Trainer, module: ContrastiveModule, epochs: int) -> None:
        """Judge the history."""
        if not trainer.is_global_zero:
            return
        total, count = (0.0, 0.0) if self._sum is None else self._sum.tolist()
        self._sum = None
        if count and trainer.global_step > settled_after(module.config, module.plan):
            step = trainer.global_step
            side = module.view_side(step - 1)
            found = EpochLoss(epochs, total / count, *_negatives(module, step), side)
            self._losses = [*self._losses, found][-_MOST_EPOCHS:]
            if module.config.objective.name == "info_nce" and step >= module.plan.total_steps / 2:
                self.set_warning(trainer, "loss at chance", loss_at_chance(found))
        if self._health.rankme is not None and _is_under_way(trainer, module):
            self._ranks = [*self._ranks, (epochs, self._health.rankme)][-_MOST_EPOCHS:]
        self.set_warning(trainer, "rising loss", rising_loss(self._losses))
        self.set_warning(trainer, "falling rank", falling_rank(self._ranks, module.miner.bank.local.dim))
        self._judge_score(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the final score, then log what still holds."""
        assert isinstance(pl_module, ContrastiveModule)
        self._judge_score(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _judge_score(self, trainer: pl.Trainer, module: ContrastiveModule) -> None:
        """Judge the newest score of the linear probe; by kNN only if there is no probe."""
        if self._online is None or not trainer.is_global_zero:
            return
        self._untrained |= self._online.untrained
        name = "probe/top1" if "probe/top1" in self._untrained else "knn/top1"
        score, untrained = self._online.scores.get(name), self._untrained.get(name)
        if score is None or untrained is None or not _is_under_way(trainer, module):
            return
        rows = len(self._online.score_rows)
        augment = module.config.augment
        jitter = max(augment.view_1.jitter, augment.view_2.jitter)
        guessing = self._online.largest_class
        below = below_untrained(name, score, untrained, rows, guessing=guessing, jitter=jitter)
        self.set_warning(trainer, "below the untrained encoder", below)
        if trainer.global_step >= module.plan.total_steps / 2:
            level = None if below else level_with_untrained(self._online.scores, self._untrained, rows)
            self.set_warning(trainer, "level with the untrained encoder", level)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        losses = [list(astuple(each)) for each in self._losses]
        ranks = [list(pair) for pair in self._ranks]
        return super().state_dict() | {"losses": losses, "ranks": ranks, "untrained": self._untrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        super().load_state_dict(state_dict)
        self._losses = [EpochLoss(*values) for values in state_dict["losses"]]
        self._ranks = [(epoch, rank) for epoch, rank in state_dict["ranks"]]
        self._untrained = dict(state_dict["untrained"])


def _is_under_way(trainer: pl.Trainer, module: ContrastiveModule) -> bool:
    """Return whether a quarter of the run is done."""
    return trainer.global_step >= module.plan.total_steps / 4


def _negatives(module: ContrastiveModule, step: int) -> tuple[float, bool]:
    """Return the number of a query's negatives in the step just done, and whether the bank gave some."""
    if module.last is None:
        return 0.0, False
    used = module.last.negatives
    weights = (used.hard_log_weight, used.shared_log_weight)
    number = sum((weight > -torch.inf).sum(1).float().mean() for weight in weights)
    return float(number), uses_bank(module, step)

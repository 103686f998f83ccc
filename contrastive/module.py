"""The training step, as the papers write it."""

import copy
import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from contrastive.augment.views import Views
from contrastive.batch_norm import Statistics, convert, shuffled
from contrastive.config import PretrainConfig, UserError
from contrastive.data.batch import Batch
from contrastive.data.plan import Plan
from contrastive.distributed import Collectives, all_true, gather_rows, gather_sizes, mean_weight, rank
from contrastive.encoders.encoder import Encoder
from contrastive.heads import predictor, projector
from contrastive.momentum import Ema, momentum_at
from contrastive.objectives.build import build_objective
from contrastive.objectives.nnclr import attach_neighbour, refuse_other_nnclr
from contrastive.optim import build_optimizer, learning_rate
from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives

logger = logging.getLogger(__name__)

COMPILER = "inductor"
"""Backend of ``torch.compile``."""


class Diverged(RuntimeError):
    """The run stopped itself, since its weights are good for nothing any more. Exit code 3.

    Args:
        reason: What was seen.
        since: Optimizer steps done when the weights were still good; they were not after one step more.
        remedy: What to do.
    """

    def __init__(
        self,
        reason: str,
        since: int,
        remedy: str = "Lower optimizer.base_lr, lengthen schedule.warmup_epochs, or set "
        "trainer.gradient_clip_val=1; where strengths of augment are unusual, lower those",
    ) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.since = since


@dataclass
class Mined:
    """What the last micro-batch was pushed away from, for callbacks to look at.

    Attributes:
        ids: (b,) data set rows of the queries.
        query: (b, d) unit rows.
        negatives: Their negatives.
    """

    ids: Tensor
    query: Tensor
    negatives: Negatives


class ContrastiveModule(pl.LightningModule):
    """Two views, a query and a key network, negatives from the bank, one objective.

    The key network is an exponential moving average of the query network (MoCo, He et al. 2020,
    arXiv:1911.05722, eq. 2). The bank is written after the optimizer step: a key is never its own negative.

    Args:
        config: The run.
        plan: Who sees what, and how many optimizer steps there are.
        encoder: The backbone; its weights are the product of the run.
        build_loader: Makes the loader of this rank once device and ranks are known.
        numbering: Which image each row is of (Images.numbering). A checkpoint of another numbering is gone on
            from without its bank, whose rows would be other images'.
        oracle_labels: Class of each row, for ``supcon`` alone, which is an oracle; else None.
    """

    patience = 3
    """Optimizer steps in a row with a loss that is not finite before the run stops."""

    idle_patience = 100
    """Likewise, without a negative for any query; in a run of fewer than twice as many, half of them."""

    least_loss_scale = 1.0
    """Of 16-mixed, whose scaler starts far above and halves; below, gradients overflow without a scale."""

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        encoder: Encoder,
        build_loader: Callable[["ContrastiveModule"], Any],
        oracle_labels: Tensor | None = None,
        *,
        numbering: str = "",
    ) -> None:
        super().__init__()
        self._numbering = numbering
        self.config, self.plan, self._build_loader = config, plan, build_loader
        sizes = config.encoder
        self.encoder = encoder
        self.projector = projector(
            encoder.dim, sizes.projector_hidden, sizes.projector_layers, sizes.projector_dim
        )
        self.predictor: nn.Module = nn.Identity()
        if sizes.predictor_hidden:
            self.predictor = predictor(sizes.projector_dim, sizes.predictor_hidden)
        for part in (self.encoder, self.projector, self.predictor):
            convert(part, sizes.batch_norm, sizes.batch_norm_splits)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        # The views are channels last; weights that are not would be rearranged in every step.
        self.to(memory_format=torch.channels_last)
        self._query = _unit_rows(self.encoder, self.projector, self.predictor)
        self._key = _unit_rows(self.key_encoder, self.key_projector)
        self.views = Views(config.augment, config.data, config.run.seed)
        self.objective = build_objective(
            config.objective, config.mining, seed=config.run.seed, labels=oracle_labels
        )
        self.diagnostics: dict[str, Tensor] = {}
        self.scheduled: dict[str, float] = {}
        self.last: Mined | None = None
        self._unwritten: list[tuple[Tensor, Tensor]] = []
        self._flags: list[Arriving] = []
        self._skipped_in_a_row = self._idle_in_a_row = 0
        self._overflowed, self._last_finite = False, -1
        self._said_idle = self._said_left_out = False
        self.skipped_steps = 0
        self._saved_miner: dict[str, Any] | None = None
        self._loader: Any = None

    def on_fit_start(self) -> None:
        """Make the bank where the network lives, and give it what a checkpoint saved of it; compile."""
        self._follow = Ema(self.encoder, self.key_encoder), Ema(self.projector, self.key_projector)
        self._statistics = Statistics(self)
        if backend := compiler(self.config.run.compile, self.device):
            self.views = Views(self.config.augment, self.config.data, self.config.run.seed, compile=backend)
            self._query, self._key = (torch.compile(f, backend=backend) for f in (self._query, self._key))
        self.miner: Miner = build_miner(
            self.config.bank,
            self.config.mining,
            rows=self.plan.rows,
            dim=self.config.encoder.projector_dim,
            seed=self.config.run.seed,
            device=self.device,
            upcoming=lambda step: self.plan.ids(step) if step < self.plan.total_steps else None,
            exchange=Collectives(),
        )
        logger.info("%s", self.miner.describe())
        if self._saved_miner is not None:
            self.miner.load_state_dict(self._saved_miner)
            self._saved_miner = None

    def on_train_start(self) -> None:
        """Refuse ranks that found different checkpoints: they would go on as different runs."""
        steps = gather_rows(torch.tensor([self.global_step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"the ranks start at steps {', '.join(map(str, steps))}: run.root={self.config.run.root} "
                "is not one folder for all of them; set it to one on a shared file system"
            )

    def on_fit_end(self) -> None:
        """Let the miner's worker go."""
        self.close()

    def close(self) -> None:
        """The same where a run ended badly; Lightning tells its callbacks of an exception, but no module."""
        if hasattr(self, "miner"):
            self.miner.close()

    def train_dataloader(self) -> Any:
        """The rest of the plan, as one pass."""
        self._loader = self._build_loader(self)
        return self._loader

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Free the last step's negatives before the next ones are gathered."""
        self.last = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: the mean loss of its images, times ``mean_weight``."""
        sizes = gather_sizes(len(batch), self.device)
        batch_ids = gather_rows(batch.ids, sizes)
        if self._loader is not None:
            self._loader.judge(batch_ids)
        if min(sizes) < 2:
            return self._sit_out(batch)
        step, in_batch = self.global_step, self.objective.in_batch
        view_1, view_2 = self.views(batch.images, batch.ids, self.plan.epoch_of(step))
        query = self.embed(view_1)
        # SimCLR: both views through the query network, with gradient; the batch is its own negatives.
        key = self.embed(view_2) if in_batch else self.keys(view_2, batch_ids, sizes)
        batch_keys = gather_rows(key, sizes)
        if self.objective.mined:
            negatives = self.miner.negatives(
                query.detach(), key, batch.ids, step, batch_keys=batch_keys, batch_ids=batch_ids
            )
        else:
            negatives = Negatives.none(query.detach())
        loss, diagnostics = self._compare(query, key, negatives, batch.ids)
        if self.config.objective.symmetric and not in_batch:
            # One look-up an image: the negatives of view 1 serve view 2 as well.
            query_2, key_1 = self.embed(view_2), self.keys(view_1, batch_ids, sizes)
            loss = (loss + self._compare(query_2, key_1, negatives, batch.ids)[0]) / 2
        self.last = Mined(batch.ids, query.detach(), negatives)
        self._unwritten.append((batch_keys, batch_ids))
        idle = diagnostics["effective_negatives"] == 0
        self._flags.append(Arriving(all_true(torch.stack([torch.isfinite(loss.detach()), idle]))))
        self.diagnostics = {"loss": loss.detach(), **diagnostics}
        return loss * mean_weight(sizes)

    def progress(self) -> dict[str, float]:
        """Epochs done; Lightning's own count stays 0, since it sees the whole plan as one pass."""
        return {"epoch": self.global_step / self.plan.steps_per_epoch}

    def _sit_out(self, batch: Batch) -> Tensor:
        """Some rank's share of the batch of which almost nothing could be read: statistics need two images.

        All ranks leave the micro-batch out, since the others would wait in the collectives of a step.
        """
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        nothing = torch.zeros(0, self.config.encoder.projector_dim, device=self.device)
        self._unwritten.append((nothing, batch.ids[:0]))
        self._flags.append(Arriving(torch.tensor([True, False], device=self.device)))
        if not self._said_left_out and rank() == 0:
            self._said_left_out = True
            logger.warning(
                "a rank could read fewer than 2 of its images of step %d (corrupt.csv lists the others), so "
                "the micro-batch is left out; a step of no other counts in train/skipped_steps",
                self.global_step,
            )
        # A gradient of 0 for each, which DDP waits for; 0 times a weight would not be 0 for all weights.
        return torch.stack([weight[:0].sum() for weight in weights]).sum()

    def _compare(
        self, query: Tensor, key: Tensor, negatives: Negatives, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, given what it asks for beside the mined negatives."""
        step = self.global_step
        if self.objective.neighbour:
            neighbour = self.miner.nearest(key, ids, step, 1)[0][:, 0]
            rows = self.miner.bank.read(self.miner.bank.slots_of(neighbour.to(self.miner.bank.device)))
            negatives = attach_neighbour(negatives, rows.to(query.device), neighbour)
        return self.objective(query, key, negatives, ids=ids, step=step)

    def embed(self, view: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-norm queries; they carry the gradient."""
        return self._query(view)

    @torch.no_grad()
    def embed_key(self, view: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-norm keys of the EMA network."""
        return self._key(view)

    def keys(
        self, view: Float[Tensor, "b 3 h w"], batch_ids: Int[Tensor, " g"], sizes: list[int]
    ) -> Float[Tensor, "b d"]:
        """Keys of this rank's images; with ``split`` or ``shuffle`` computed in other company than queries.

        Args:
            view: Of this rank's images.
            batch_ids: Data set rows of all ranks' images.
            sizes: Every rank's b.
        """
        if self.config.encoder.batch_norm not in ("split", "shuffle"):
            return self.embed_key(view)
        order = shuffled(batch_ids, self.config.run.seed, self.global_step)
        mine = torch.split(order, sizes)[rank()]
        # Channels go last over the wire, as they lie in memory: rows are gathered in the order of their axes.
        views = gather_rows(view.permute(0, 2, 3, 1), sizes)[mine].permute(0, 3, 1, 2)
        found = gather_rows(self.embed_key(views), sizes)
        return torch.split(torch.empty_like(found).index_copy_(0, order, found), sizes)[rank()]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step on every rank if any rank's loss is not finite: weights without a gradient stay.

        So too where no image entered: momentum and weight decay act on gradients of 0.
        """
        finite, idle = zip(*(flags.read() for flags in self._flags), strict=True)
        self._step_is_sound, self._step_is_idle = all(finite), all(idle)
        self._step_is_empty = not any(len(ids) for _, ids in self._unwritten)
        self._loss_scale = self._read_loss_scale()
        if self._step_is_empty or not self._step_is_sound:
            optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the key network's, then the bank's."""
        step, sizes = self.global_step, self.config.encoder
        momentum = momentum_at(step, self.plan.total_steps, sizes.momentum, sizes.momentum_end)
        # Kept for the row of this step: when callbacks log it, the scheduler has set the next step's rate.
        self.scheduled = {"lr": self.trainer.optimizers[0].param_groups[0]["lr"], "momentum": momentum}
        super().optimizer_step(*args, **kwargs)
        unwritten, self._unwritten, self._flags = self._unwritten, [], []
        if not self._is_taken(step):
            self._statistics.restore()
            return
        self._count_idle(step)
        for follow in self._follow:
            follow(momentum)
        keys, ids = (torch.cat(parts) for parts in zip(*unwritten, strict=True))
        self.miner.write(keys, ids, step)
        self._statistics.keep()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Of trainer.precision=16-mixed alone."""
        found: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return found

    def _read_loss_scale(self) -> float:
        """It falls when the scaler leaves a step out. Waits for the device, as the scaler itself does."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def _is_taken(self, step: int) -> bool:
        """Whether the weights moved; steps that they did not are counted."""
        loss_scale = self._read_loss_scale()
        self._overflowed = loss_scale < self._loss_scale  # gradients, in 16-mixed
        taken = self._step_is_sound and not self._step_is_empty and not self._overflowed
        self.skipped_steps += not taken
        if self._step_is_empty:  # it had no loss
            return False
        self._skipped_in_a_row = 0 if self._step_is_sound else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.patience:
            raise Diverged(
                f"the loss was not finite {self.patience} optimizer steps in a row, the last is step {step}",
                since=self._last_finite,
            )
        if self._step_is_sound and self._overflowed and loss_scale < self.least_loss_scale:
            raise Diverged(
                f"gradients overflow float16 at a loss scale of {loss_scale:g}, the last at step {step}",
                since=self._last_finite,
                remedy="Set trainer.precision=bf16-mixed, which has float32's range, or 32-true",
            )
        if taken:
            self._last_finite = step
        return taken

    def _count_idle(self, step: int) -> None:
        """Without negatives nothing is learnt: said when first seen, and a reason to stop if it stays so."""
        self._idle_in_a_row = self._idle_in_a_row + 1 if self._step_is_idle else 0
        patience = min(self.idle_patience, -(-self.plan.total_steps // 2))
        if self._idle_in_a_row == patience:
            raise Diverged(
                f"no query had a negative for {patience} optimizer steps, the last is step {step}",
                since=step - patience + 1,
                remedy=self._what_drops(),
            )
        if self._step_is_idle and not self._said_idle and rank() == 0:
            self._said_idle = True
            logger.warning(
                "no query of step %d has a negative: nothing is learnt. %s", step, self._what_drops()
            )

    def _what_drops(self) -> str:
        """Which filters leave no negatives."""
        shares = {name: float(share) for name, share in self.miner.metrics().items() if "/drop_" in name}
        drops = [
            f"mining.{name.partition('drop_')[2]} drops {share:.1%}"
            for name, share in shares.items()
            if share
        ]
        if not drops:
            return "The bank holds no other image; a higher mining.min_fill lets it fill first"
        return f"Of the bank's rows {', '.join(drops)}; loosen that, in a new run"

    @property
    def in_doubt(self) -> bool:
        """Whether the last loss was not finite, or its gradients: the weights may be why."""
        return self._skipped_in_a_row > 0 or self._overflowed

    def on_train_epoch_end(self) -> None:
        """The end of the plan: no loss follows that would tell what the last step did to the weights.

        Of batch norm's running statistics no loss tells ever.
        """
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        statistics = [buffer for buffer in self.buffers() if buffer.is_floating_point()]
        norms = torch._foreach_norm(weights + statistics)
        if not torch.stack(list(norms)).isfinite().all():
            raise Diverged(
                f"weights or running statistics are not finite after {self.global_step} optimizer steps",
                since=self._last_finite,
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the learning rate as a function of the optimizer step."""
        looked_at = self._scaler is not None or bool(self.trainer.gradient_clip_val)
        optimizer = build_optimizer(
            self, self.config.optimizer, self.config.data.global_batch, fuse=not looked_at
        )
        schedule = self.config.schedule
        warmup = round(schedule.warmup_epochs * self.plan.steps_per_epoch)

        def factor(step: int) -> float:
            return learning_rate(step, total_steps=self.plan.total_steps, warmup_steps=warmup)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: the bank, and the count of skipped steps."""
        checkpoint["miner"] = self.miner.state_dict()
        checkpoint["numbering"] = self._numbering
        checkpoint["objective"] = self.config.objective.name
        checkpoint["skipped"] = [self.skipped_steps, self._skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; the miner is made later, when the device is known."""
        refuse_other_nnclr(self.config.objective.name, checkpoint.get("objective"))
        _stand_at(checkpoint, self.trainer.accumulate_grad_batches)
        if checkpoint["numbering"] == self._numbering:
            self._saved_miner = checkpoint["miner"]
        else:
            logger.warning("files were added or removed, so rows are numbered anew: the bank starts empty")
        self.skipped_steps, self._skipped_in_a_row = checkpoint["skipped"]
        self._last_finite = checkpoint["global_step"] - 1 - self._skipped_in_a_row


class Arriving:
    """Flags on their way from the device; reading them waits for what the device was given before them alone.

    Made right after the loss and read after the backward pass was started, they never leave a GPU idle:
    while the host learns that it may take the step, the device still has the backward pass to do.
    """

    def __init__(self, flags: Bool[Tensor, " f"]) -> None:
        self._flags = flags.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None

    def read(self) -> list[bool]:
        """The flags, once they are here."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return list(map(bool, self._flags))


def compiler(setting: str, device: torch.device) -> str | None:
    """The backend of ``torch.compile`` that ``run.compile`` means on ``device``; None is not to compile.

    On a CPU ``auto`` does not: the networks' convolutions gain nothing.
    """
    if setting == "auto" and device.type == "cuda":
        missing = [] if importlib.util.find_spec("triton") else ["Triton"]
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            missing.append("a C compiler")
        if missing:
            logger.info("networks and views are not compiled: %s missing", " and ".join(missing))
        return None if missing else COMPILER
    return COMPILER if setting == "true" else None


def _unit_rows(*parts: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images through ``parts``, to unit-norm rows in float32."""

    def forward(view: Tensor) -> Tensor:
        for part in parts:
            view = part(view)
        return F.normalize(view.float(), dim=1)

    return forward


def _stand_at(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let Lightning's loops stand just after the batch that completed the checkpoint's optimizer step.

    The step alone decides where a run stands. What the loops saved depends also on why it stopped (a run cut
    short by ``max_steps`` looks finished) and on the micro-batches of a step, which may differ now.
    """
    step = checkpoint["global_step"]
    batches, loop = step * accumulate, checkpoint["loops"]["fit_loop"]
    begun = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    delivered = {"ready": batches, "completed": batches - 1, "started": batches, "processed": batches}
    loop["epoch_progress"] = {"total": dict(begun), "current": dict(begun)}
    loop["epoch_loop.batch_progress"] |= {"total": dict(delivered), "current": dict(delivered)}
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    for loader in loop["state_dict"]["combined_loader"]:
        loader["delivered"] = batches

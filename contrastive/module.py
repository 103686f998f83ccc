"""The LightningModule: runs a method's step with its views, networks, optimizer, plan and bank."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from contrastive.augment.views import Views
from contrastive.compiling import compiler
from contrastive.config import PretrainConfig, UserError
from contrastive.data.batch import Batch
from contrastive.data.order.base import BankOrder
from contrastive.data.plan import Plan, in_first_half
from contrastive.distributed import Rows, gather_rows, mean_weight, on_any_rank, rank, rows_of_first_rank
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.training import depths
from contrastive.lightning_glue import continue_after, loss_scaler
from contrastive.methods.method import Method
from contrastive.momentum import momentum_at
from contrastive.networks import plain_attention
from contrastive.optim import build_optimizer, learning_rate
from contrastive.step_guard import StepGuard, explain_no_negatives
from memory_bank.draw import mix
from memory_bank.miner import Miner
from memory_bank.negatives import Negatives

logger = logging.getLogger(__name__)

_DROPOUT_STREAM = 2_000
"""Number that sets the seeds of dropout apart from those of the miner and of batch norm."""


@dataclass
class LastBatch:
    """The queries of the last micro-batch and their negatives, for monitors.

    Attributes:
        ids: (b,) data set rows of the queries.
        query: (b, d) unit rows.
        negatives: The negatives of these queries.
    """

    ids: Tensor
    query: Tensor
    negatives: Negatives


class ContrastiveModule(pl.LightningModule):
    """LightningModule that trains the networks of a method and updates its bank.

    The bank is written after the optimizer step, so a key is never its own negative.

    Args:
        config: The run.
        plan: Rows of each optimizer step, and the number of steps.
        method: The training step, with its networks and its miner.
        build_loader: Builds the loader of this rank; called once the process group exists.
        row_identity: Hash of the row -> image mapping (``Images.row_identity_hash``). If that of a checkpoint
            differs, its weights are resumed with an empty bank, because its slots belong to other images.
    """

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        method: Method,
        build_loader: Callable[[pl.Trainer], Any],
        *,
        row_identity: str = "",
    ) -> None:
        super().__init__()
        self.config, self.plan, self._build_loader = config, plan, build_loader
        self._row_identity = row_identity
        self.networks, self.method = method.networks, method
        self._build_views(None)
        self.diagnostics: dict[str, Tensor] = {}
        self.scheduled: dict[str, float] = {}
        self.last: LastBatch | None = None
        self.guard = StepGuard(lambda: plan.total_steps, lambda: explain_no_negatives(self.miner.dropped()))
        self._unwritten: list[tuple[Tensor, Tensor]] = []
        self._loader: Any = None

    @property
    def encoder(self) -> Encoder:
        """Return the backbone; its weights are the result of the run."""
        return self.networks.encoder

    @property
    def miner(self) -> Miner:
        """Return the bank and its search."""
        return self.method.miner

    @property
    def mines(self) -> bool:
        """Return whether negatives come from the bank; else it is kept for monitors, and for neighbours."""
        return self.method.mines and self.miner.method.uses_bank

    @property
    def reads_bank(self) -> bool:
        """Return whether a step reads the bank, for negatives or neighbours; else only monitors do."""
        return self.mines or self.method.finds_neighbours

    def on_fit_start(self) -> None:
        """Compile networks and views, and pair the EMA tensors, now that all are on the training device."""
        backend = compiler(self.config.run.compile, self.device)
        if backend is not None:
            self._build_views(backend)
        self.networks.prepare(backend)
        if self.reads_bank:
            unused = "" if self.mines else "; no negatives are taken from it"
            logger.info("%s%s", self.miner.describe(), unused)
        self.guard.attach(self, loss_scaler(self))

    def on_train_start(self) -> None:
        """Refuse to train if ranks resumed from different checkpoints: they would be different runs."""
        steps = gather_rows(torch.tensor([self.global_step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"the ranks start at steps {', '.join(map(str, steps))}: run.root={self.config.run.root} "
                "is not one folder for all of them; set it to one on a shared file system"
            )

    def train_dataloader(self) -> Any:
        """Build the loader, which yields the rest of the plan in one pass."""
        self._loader = self._build_loader(self.trainer)
        return self._loader

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Free the last step's negatives before the next ones are gathered."""
        self.last = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the mean loss of one micro-batch, times ``mean_weight``."""
        rows, step = Rows.of(batch.ids), self.global_step
        # Dropout and drop path draw from torch's generator: a pure function of the micro-batch, so that a
        # resume draws the same.
        torch.manual_seed(mix(self.config.run.seed, _DROPOUT_STREAM, batch_idx, rank()))
        if self._loader is not None:
            self._loader.check_corrupt_share(rows.all_ids, on_any_rank)
        if min(rows.sizes) < 2:
            return self.guard.note_left_out(step)
        self.networks.freeze(step < self._frozen_steps())
        make_views = self._first_views if in_first_half(step, self.plan.total_steps) else self.views
        views = make_views(batch.images, batch.ids, self.plan.epoch_of(step))
        with plain_attention(self.device):
            outcome = self.method.step(views, rows, step)
        if outcome.keys is not None:
            self._unwritten.append((outcome.keys, rows.all_ids))
        if outcome.query is not None and outcome.negatives is not None:
            self.last = LastBatch(batch.ids, outcome.query, outcome.negatives)
        self.diagnostics = {"loss": outcome.loss.detach(), **outcome.diagnostics}
        self.guard.note(outcome.loss, outcome.diagnostics)
        return outcome.loss * mean_weight(rows.sizes)

    def _build_views(self, backend: str | None) -> None:
        augment, data, seed = self.config.augment, self.config.data, self.config.run.seed
        self.views = self._first_views = Views(augment, data, seed, compile=backend)
        if augment.first_size is not None:
            self._first_views = Views(augment, data, seed, compile=backend, first_half=True)

    def view_side(self, step: int) -> int:
        """Return the side of the global views of optimizer step ``step``: it may change in the middle."""
        first, last = self.config.augment.global_sides(self.config.data.image_size)
        return first if in_first_half(step, self.plan.total_steps) else last

    def _frozen_steps(self) -> int:
        """Return the optimizer steps in which the encoder is frozen."""
        steps = round(self.config.encoder.freeze_epochs * self.plan.steps_per_epoch)
        return steps if self.config.schedule.minutes is None else min(steps, self.plan.total_steps // 4)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients if the step must not be taken (``StepGuard``), and a frozen encoder's."""
        self.guard.before_step(optimizer)
        self.networks.drop_frozen_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then move the key network, then write the bank."""
        step, encoder = self.global_step, self.config.encoder
        momentum = momentum_at(step, self.plan.total_steps, encoder.momentum, encoder.momentum_end)
        # For the row of this step: when callbacks log it, the scheduler has set the next step's rate.
        self.scheduled = {"lr": self.trainer.optimizers[0].param_groups[0]["lr"], "momentum": momentum}
        super().optimizer_step(*args, **kwargs)
        unwritten, self._unwritten = self._unwritten, []
        if self.guard.after_step(step):
            self.networks.follow(momentum)
            if unwritten:
                keys, ids = (torch.cat(parts) for parts in zip(*unwritten, strict=True))
                self.miner.write(keys, ids, step)
            self.guard.keep_buffers()
        self._compose_epoch(step + 1)

    def _compose_epoch(self, step: int) -> None:
        """Compose the epoch that begins with ``step`` from the bank, on rank 0 for all ranks."""
        plan, bank = self.plan, self.miner.bank
        is_over = step == plan.total_steps and self.config.schedule.minutes is None
        if isinstance(plan.order, BankOrder) and step % plan.steps_per_epoch == 0 and not is_over:
            ids, epoch = torch.empty(plan.rows, dtype=torch.int64), plan.epoch_of(step)
            if rank() == 0:
                ids = plan.order.compose(epoch, bank.key, bank.id >= 0)
            plan.order.adopt(epoch, rows_of_first_rank(ids))

    def on_train_epoch_end(self) -> None:
        """Check the weights at the end of the plan."""
        self.guard.check_weights(self.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer, and the learning rate as a function of the optimizer step."""
        encoder_depths = depths(self.encoder) if self.config.optimizer.layer_decay < 1 else {}
        # A fused step leaves no moment at which gradients are unscaled and not applied yet.
        reads_gradients = loss_scaler(self) is not None or bool(self.trainer.gradient_clip_val)
        optimizer = build_optimizer(
            self,
            self.config.optimizer,
            self.config.data.global_batch,
            fuse=not reads_gradients,
            depths={f"networks.encoder.{name}": depth for name, depth in encoder_depths.items()},
        )

        def factor(step: int) -> float:
            total = self.plan.total_steps  # of now: a time budget may change it
            warmup = self.config.schedule.warmup_steps(self.plan.steps_per_epoch, total)
            return learning_rate(step, total_steps=total, warmup_steps=warmup)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def progress(self) -> dict[str, float]:
        """Return the epochs done; Lightning's own count stays 0, since it sees the whole plan as one pass."""
        return {"epoch": self.global_step / self.plan.steps_per_epoch}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add bank, row identity and guard counts; weights are saved under the names of all releases."""
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("networks."): value for name, value in weights.items()}
        checkpoint["miner"] = self.miner.state_dict()
        checkpoint["numbering"] = self._row_identity  # the file format's name of the row identity
        checkpoint["objective"] = self.config.objective.name
        checkpoint["skipped"] = self.guard.state_dict()
        if isinstance(self.plan.order, BankOrder):
            checkpoint["order"] = self.plan.order.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore bank, position, weights and guard counts."""
        self.method.check_checkpoint(checkpoint)
        continue_after(checkpoint, self.trainer.accumulate_grad_batches)
        checkpoint["state_dict"] = self.named_weights(checkpoint["state_dict"])
        if checkpoint["numbering"] == self._row_identity:
            self.miner.load_state_dict(checkpoint["miner"])
            if isinstance(self.plan.order, BankOrder):
                self.plan.order.load_state_dict(checkpoint["order"])
        else:
            logger.warning("files were added or removed, so rows are numbered anew: the bank starts empty")
            checkpoint["state_dict"] |= self._row_buffers()
        self.guard.load_state_dict(checkpoint["skipped"], checkpoint["global_step"])

    def _row_buffers(self) -> dict[str, Tensor]:
        """Return what the method keeps for each row, by the names of the state dict."""
        return {f"method.{name}": getattr(self.method, name) for name in self.method.row_buffers}

    def named_weights(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's weights to this module's names; drop the key network if it has none."""
        own = self.state_dict()
        named = {name if name in own else f"networks.{name}": value for name, value in saved.items()}
        unused = {name for name in named if name.startswith("networks.key_") and name not in own}
        return {name: value for name, value in named.items() if name not in unused}

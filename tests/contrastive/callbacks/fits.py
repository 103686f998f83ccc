"""Tiny runs of Lightning that save their checkpoints."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from contrastive.callbacks.preemption import Preemption
from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from memory_bank.state import read_state
from tests.contrastive.checkpoint.saves import extra

quiet = pytest.mark.filterwarnings(
    # Lightning's advice on these runs, and its own use of deprecated torch and Python calls.
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


class Loader:
    """Batches of an epoch as a pure function of (epoch, index); continues where its state says."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.delivered = batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            generator = torch.Generator().manual_seed(1000 + self.delivered)
            self.delivered += 1
            yield torch.randn(4, 8, generator=generator)
            if self.delivered % self.batches == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"delivered": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.delivered = state["delivered"]


class Module(LightningModule):
    """A network with momentum, a schedule and a bank; ``events(step)`` is called for each batch."""

    def __init__(self, events: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.events = events
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.bank = torch.zeros(5, 8)
        self.losses: dict[int, float] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.events(self.trainer.global_step)
        loss: torch.Tensor = (self.net(batch) - self.bank.mean() + batch.sum(1, keepdim=True)).square().mean()
        self.losses[self.trainer.fit_loop.total_batch_idx] = loss.item()
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.bank[self.trainer.global_step % 5] = self.net[0].weight.detach().mean(0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_end(self) -> None:
        self.handler_at_end = signal.getsignal(signal.SIGTERM)  # before Lightning restores what it knows

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["miner"] = {"bank": self.bank.clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bank = checkpoint["miner"]["bank"]


def fit(
    root: Path,
    *,
    every_steps: int | None = None,
    keep_last: int = 99,
    resume: Path | None = None,
    events: Callable[[int], None] = lambda step: None,
    callbacks: tuple[Any, ...] = (),
    accumulate: int = 2,
    ranks: int = 1,
    **options: Any,
) -> tuple[Trainer, Module, Preemption]:
    """Two epochs of 6 batches; returns trainer, module and the Preemption callback."""
    saver = SaveCheckpoint(
        root,
        every_steps,
        keep_last,
        lambda trainer, folder: extra(trainer.global_step, folder),
    )
    preemption = Preemption(saver)
    module = Module(events)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        default_root_dir=root.parent,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        plugins=[DirectoryCheckpointIO()],
        callbacks=[saver, preemption, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, Loader(), ckpt_path=resume, weights_only=True)
    return trainer, module, preemption


def state_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / "trainer.pt", weights_only=True)
    return state | {"bank": read_state(path / "bank.safetensors")}

"""A tiny training, for what happens while one runs; W&B's own reader of what it logged."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from contrastive import lightning_glue as rows


class Loader:
    """Batches with ``images``, delivered after a pause."""

    def __init__(self, batches: int, pause_s: float = 0.0) -> None:
        self.batches, self.pause_s = batches, pause_s

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            time.sleep(self.pause_s)
            yield {"images": torch.ones(4, 3)}


def fit(tmp_path: Path, loggers: Any, callbacks: list[Any], loader: Loader, **options: Any) -> Any:
    from pytorch_lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(options_step_s)
            loss: torch.Tensor = self.net(batch["images"]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    options_step_s = options.pop("step_s", 0.0)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=loggers,
        callbacks=callbacks,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 1, "log_every_n_steps": 2, "enable_progress_bar": False} | options,
    )
    trainer.fit(Module(), loader)
    return trainer


def make_row_logger() -> Any:
    from pytorch_lightning import Callback

    class Rows(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = {"train/half": trainer.global_step / 2, "train/step": torch.tensor(trainer.global_step)}
            if trainer.global_step > 0 and trainer.global_step % rows.log_interval(trainer) == 0:
                rows.log_row(trainer, metrics)

    return Rows()


def read_records(path: Path) -> dict[str, list[Any]]:
    """Records by type of an offline run, by W&B's own reader."""
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, _inspect(path).splitlines()):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records


def read_summary(path: Path) -> dict[str, Any]:
    """What W&B's own reader says of an offline run as a whole."""
    summary: dict[str, Any] = json.loads(_inspect(path, "--summary"))
    return summary


def _inspect(path: Path, *options: str) -> str:
    """Return what `wandb leet inspect` prints; do without the imports and telemetry of wandb's command."""
    from wandb.util import get_core_path

    (file,) = path.glob("*.wandb")
    offline = ["--no-observability", "--json", *options, "--run-file", str(file), str(path.parent)]
    tool = [get_core_path(), "leet", "inspect", *offline]
    ended = subprocess.run(tool, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout

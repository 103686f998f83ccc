"""Rows of metrics, from a callback or from ``optimizer_step`` to every logger.

Lightning's own ``self.log`` counts from 0 and reaches the loggers only *after* the callbacks that save, so a
kill would lose a row; :func:`log_row` does neither.
"""

from collections.abc import Mapping

import torch
from pytorch_lightning import Trainer
from torch import Tensor


def log_row(trainer: Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Send ``metrics`` to all loggers as (part of) the row of the optimizer steps taken so far.

    Scalar tensors of one device are fetched in one transfer; ``epoch`` may be among them. Only
    rank 0 logs.
    """
    if not trainer.loggers or not trainer.is_global_zero:
        return
    values = _floats(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_interval(trainer: Trainer) -> int:
    """Optimizer steps between two rows, ``Trainer(log_every_n_steps=...)``; 0 logs nothing."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
    return every


def is_logged(trainer: Trainer) -> bool:
    """Whether the optimizer step just done has a row: one in every interval, and the run's last."""
    every, step = log_interval(trainer), trainer.global_step
    return every > 0 and (step % every == 0 or step == trainer.max_steps or trainer.is_last_batch)


def _floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    values = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        values |= dict(
            zip(names, torch.stack([tensors[name].to(wide) for name in names]).tolist(), strict=True)
        )
    return {name: float(values[name]) for name in metrics}

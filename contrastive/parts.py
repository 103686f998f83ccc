"""Build the parts of a run that are not callbacks: networks, miner, method, module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch

from contrastive.augment.boxes import DrawBoxes
from contrastive.augment.moments import DrawMoments
from contrastive.config import PretrainConfig, UserError, first_line
from contrastive.data.clips import draw_clips
from contrastive.data.crops import draw_crops
from contrastive.data.images import Images
from contrastive.data.loader import build_loader
from contrastive.data.order.base import BankOrder
from contrastive.data.plan import Plan, Share
from contrastive.distributed import Collectives
from contrastive.encoders.build import build_encoder, check_encoder
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.training import freeze_patch_projection, recompute_activations
from contrastive.encoders.weights import load_weights
from contrastive.fit_checks import (
    check_fit,
    check_method,
    check_order,
    check_sees_order,
    check_views,
    is_out_of_memory,
    tell_busy,
    warn_of_settings,
)
from contrastive.methods.build import find_method, takes_from_bank
from contrastive.methods.method import BuildMethod, Method, Parts
from contrastive.module import ContrastiveModule
from contrastive.networks import Networks
from contrastive.objectives.build import takes_labels
from contrastive.run_dir import UnreadableFiles
from memory_bank.config import BankConfig
from memory_bank.methods.base import method_of
from memory_bank.miner import Miner, build_miner

SHOWN_ROWS = 65_536
"""Most slots of a bank that only monitors read: one for each of 100 million rows takes 25 GiB a rank."""


@dataclass(frozen=True)
class Given:
    """Parts passed to ``pretrain`` by a Python program, instead of those that the config names."""

    images: Any = None
    encoder: Encoder | None = None
    method: BuildMethod | None = None
    miner: Callable[..., Miner] = build_miner
    callbacks: Sequence[pl.Callback] = field(default=())

    def __post_init__(self) -> None:
        if self.encoder is not None and not isinstance(self.encoder, Encoder):
            raise UserError(
                f"encoder={self.encoder!r:.80}: an instance of contrastive.encoders.encoder.Encoder is needed"
            )
        for name, part in (("method", self.method), ("miner", self.miner)):
            if part is not None and not callable(part):
                raise UserError(
                    f"{name}={part!r:.80}: a class or a function that builds it is needed; to choose one by "
                    "name, set it in the config"
                )

    def names(self) -> dict[str, str]:
        """Name the parts that take the place of the config's, for config.yaml: a resume needs the same."""
        parts: dict[str, Any] = {"method": self.method, "encoder": self.encoder and type(self.encoder)}
        if self.miner is not build_miner:
            parts["miner"] = self.miner
        return {
            name: getattr(part, "__qualname__", type(part).__qualname__)
            for name, part in parts.items()
            if part is not None
        }


def choose_bank(config: PretrainConfig, given: Given, plan: Plan, begun: PretrainConfig | None) -> BankConfig:
    """Replace ``bank.kind=auto``: a slot for each row, or for a sample where only monitors read the bank.

    Args:
        config: The run.
        given: Parts that replace those the config names.
        plan: Rows of each optimizer step.
        begun: The config that the run was begun with, whose bank it keeps; None of a new run.
    """
    bank = config.bank
    if bank.kind != "auto":
        return bank
    if begun is not None:
        return replace(bank, kind=begun.bank.kind, capacity=begun.bank.capacity)
    method = given.method or find_method(config)
    mined = takes_from_bank(method, method_of(config.mining))
    read = mined or getattr(method, "finds_neighbours", False) or isinstance(plan.order, BankOrder)
    if read or given.miner is not build_miner or plan.rows <= SHOWN_ROWS:
        return replace(bank, kind="dataset")
    return replace(bank, kind="queue", capacity=SHOWN_ROWS)


def build_module(
    config: PretrainConfig,
    given: Given,
    plan: Plan,
    images: Images,
    trainer: pl.Trainer,
    unreadable: UnreadableFiles,
    *,
    resumed: bool = False,
) -> ContrastiveModule:
    """Build the module of a run, after checking that its settings and devices fit each other.

    Args:
        config: The run.
        given: Parts that replace those the config names.
        plan: Rows of each optimizer step.
        images: The training images.
        trainer: Lightning's trainer, which knows the devices.
        unreadable: List of images that cannot be read (corrupt.csv).
        resumed: Whether the weights will come from a checkpoint.

    Raises:
        UserError: settings that are incompatible with each other, the data or the devices.
    """

    def note_corrupt(row: int, reason: str) -> None:
        unreadable.add(row, images.key(row), reason)

    clips = 3 if config.objective.own_negatives == "clips" else 2

    def loader(trainer: pl.Trainer) -> Any:
        drawn = draw_clips(
            images, config.data, DrawMoments(config.augment.time, config.run.seed, clips), clips
        )
        boxes = DrawBoxes(config.augment, config.data, config.run.seed)
        return build_loader(
            draw_crops(drawn, config.data, boxes, boxes.sides),
            plan,
            config.data,
            device=trainer.strategy.root_device,
            share=Share(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches),
            on_corrupt=note_corrupt,
            progress=config.logging.progress,
        )

    check_fit(config, plan, trainer)
    method = given.method or find_method(config)
    name = config.method if given.method is None else getattr(method, "__name__", "given")
    check_method(config, method, name)
    check_order(config, plan)
    networks = _build_networks(config, given.encoder, resumed, getattr(method, "averages_keys", True))
    miner = _build_miner(config, given.miner, plan, trainer)
    check_views(config, miner, method, resumed=resumed)
    warn_of_settings(config, plan, miner, method, name)
    tell_busy(trainer.strategy.root_device)
    labels = images.labels if takes_labels(config.objective) else None
    parts = Parts(config, networks, miner, plan.rows, labels)
    built = method(parts)
    if not isinstance(built, Method):
        raise UserError(f"method: {name} built a {type(built).__name__}; a Method is needed")
    return ContrastiveModule(config, plan, built, loader, row_identity=images.row_identity_hash())


def _build_networks(
    config: PretrainConfig, encoder: Encoder | None, resumed: bool, averaged: bool
) -> Networks:
    torch.manual_seed(config.run.seed)
    try:
        if encoder is None:
            encoder = build_encoder(config.encoder, config.data.image_size, config.data.frames)
        if config.encoder.weights is not None and not resumed:  # a checkpoint has every weight
            load_weights(encoder, config.encoder.weights)
        sizes = config.augment.sizes(config.data.image_size)
        check_encoder(encoder, config.data.image_size, *sizes, frames=config.data.frames)
        check_sees_order(config, encoder)
        if config.encoder.freeze_patch_projection:
            freeze_patch_projection(encoder)
        if config.encoder.grad_checkpointing:
            recompute_activations(encoder)
        return Networks(encoder, config.encoder, seed=config.run.seed, averaged=averaged)
    except RuntimeError as error:  # torch raises it for too little memory, and for sizes that overflow
        raise UserError(
            f"encoder: the networks cannot be built ({first_line(error)}); lower encoder.width, or "
            "take another encoder.name, lower encoder.projector_hidden or encoder.predictor_hidden"
        ) from error


def _build_miner(
    config: PretrainConfig, build: Callable[..., Miner], plan: Plan, trainer: pl.Trainer
) -> Miner:
    try:
        return build(
            config.bank,
            config.mining,
            rows=plan.rows,
            dim=config.encoder.projector_dim,
            seed=config.run.seed,
            device=trainer.strategy.root_device,
            upcoming=lambda step: plan.ids(step) if step < plan.total_steps else None,
            exchange=Collectives(trainer.global_rank, trainer.world_size),
        )
    except (ValueError, RuntimeError, MemoryError) as error:
        remedy = "; lower bank.capacity or encoder.projector_dim" if is_out_of_memory(error) else ""
        raise UserError(f"bank and mining: {error}{remedy}") from error

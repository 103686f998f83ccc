"""Check a run against its images and devices, before the first byte is written."""

import logging
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from contrastive.config import PretrainConfig, UserError
from contrastive.data.decode import DARK, Unreadable
from contrastive.data.images import Images, read_or_none, spread_rows
from contrastive.data.order.base import BankOrder
from contrastive.data.plan import Plan, Share
from contrastive.encoders.encoder import Encoder
from contrastive.encoders.temporal import TemporalEncoder
from contrastive.methods.build import takes_from_bank
from contrastive.run_dir import is_first_rank
from contrastive.short_run import too_short_for
from contrastive.unread import unread
from memory_bank.miner import Miner
from memory_bank.policy import overruled

logger = logging.getLogger(__name__)

_LOOKED_AT = 8  # images, to find out whether most are nearly black


def check_readable(images: Images) -> None:
    """Refuse a data set without a readable image: decode images until one succeeds."""
    reason = ""
    for row in range(len(images)):
        try:
            images.read(row)
        except Unreadable as error:
            reason = reason or f"{images.key(row)}: {error}"
        else:
            return
    raise UserError(
        f"none of the {len(images)} {images.noun} can be read ({reason}); "
        "check data.root, the files' rights and format"
    )


def warn_if_dark(images: Images) -> None:
    """Warn if most images are nearly black, as those of 12 bits are by the white of 16; a few are read."""
    if not is_first_rank():
        return
    rows = spread_rows(len(images), _LOOKED_AT).tolist()
    read = [image for row in rows if (image := read_or_none(images, row)) is not None]
    if read and statistics.median(int(image.max()) for image in read) < DARK:
        logger.warning(
            "at least half of the %s are nearly black (no value reaches %d of 255); if they are "
            "grey files of more than 8 bits, set data.white to their largest value (4095 for 12 bits)",
            images.noun,
            DARK,
        )


def check_fit(config: PretrainConfig, plan: Plan, trainer: pl.Trainer) -> None:
    """Refuse settings that do not fit the devices.

    Raises:
        UserError: batch size or batch norm and devices are incompatible.
    """
    _check_batch(config, plan, trainer)
    _check_batch_norm(config, trainer)


def _check_batch(config: PretrainConfig, plan: Plan, trainer: pl.Trainer) -> None:
    """Refuse a global batch that does not divide evenly, or leaves too few images for batch norm."""
    ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    local_batch = plan.local_batch(Share(world=ranks, accumulate=accumulate))
    splits = config.encoder.batch_norm_splits if config.encoder.batch_norm == "split" else 1
    if local_batch < 2 * splits:
        groups = f" in each of the {splits} groups (encoder.batch_norm_splits)" if splits > 1 else ""
        raise UserError(
            f"data.global_batch={plan.global_batch} over {ranks} ranks x {accumulate} accumulated "
            f"micro-batches: a step needs 2 images{groups}; use {2 * splits * ranks * accumulate} or more"
        )


def _check_batch_norm(config: PretrainConfig, trainer: pl.Trainer) -> None:
    kind, ranks, device = config.encoder.batch_norm, trainer.world_size, trainer.strategy.root_device.type
    if kind == "shuffle" and ranks == 1:
        raise UserError(
            "encoder.batch_norm=shuffle computes keys on other devices than their queries, and there is one "
            "device; use encoder.batch_norm=split, or trainer.devices=2 or more"
        )
    if kind == "sync" and ranks > 1 and device == "cpu":
        raise UserError(
            f"encoder.batch_norm=sync works between GPUs, these are {ranks} processes on the CPU; use "
            "encoder.batch_norm=shuffle"
        )


def check_method(config: PretrainConfig, method: Callable[..., Any], name: str) -> None:
    """Refuse settings that the method cannot work with.

    Args:
        config: The run.
        method: Its class; a function that builds one declares nothing, so nothing is checked.
        name: Of the method, for messages.

    Raises:
        UserError: look-ups ahead or own negatives that it does not take, or a predictor is missing.
    """
    if not getattr(method, "mines", True) and config.mining.query == "stored":
        raise UserError(
            f"mining.query=stored looks up what method={name} does not use, since it takes no negatives from "
            "the bank; use mining.query=fresh"
        )
    own = config.objective.own_negatives
    if own != "none" and not getattr(method, "takes_own_negatives", True):
        raise UserError(
            f"objective.own_negatives={own}: method={name} has no negatives of single queries; leave it "
            "out, or use method=moco, neighbour or simclr"
        )
    if getattr(method, "needs_predictor", False) and not config.encoder.predictor_hidden:
        raise UserError(
            f"method={name} collapses without a predictor; set encoder.predictor_hidden, e.g. to 4096"
        )


def check_views(config: PretrainConfig, miner: Miner, method: Callable[..., Any], *, resumed: bool) -> None:
    """Refuse a symmetric loss on keys of a bank if the views are unlike; of a resumed run, warn.

    The bank has keys of view 2, and the positive of the second direction is a key of view 1: the augmentation
    alone, whatever the image shows, would tell it from its negatives.

    Args:
        config: The run.
        miner: Its miner.
        method: The method's class, or a function that builds one, of which nothing is known.
        resumed: Whether it was begun earlier, when this was not refused.

    Raises:
        UserError: half of the loss could be had for nothing.
    """
    augment = config.augment
    if not config.objective.symmetric or augment.view_1 == augment.view_2:
        return
    reads = miner.method.uses_bank or getattr(method, "finds_neighbours", False)
    if not reads or not getattr(method, "mines", True):
        return
    problem = (
        "objective.symmetric=true, and augment.view_1 and view_2 differ: the bank has keys of view 2, "
        "so the augmentation alone tells view 1's key from its negatives"
    )
    if not resumed:
        raise UserError(
            f"{problem}; set objective.symmetric=false, make the views alike, or take method=moco with "
            "mining.method=in_batch"
        )
    if is_first_rank():
        logger.warning("%s; a new run of these settings would be refused", problem)


def check_sees_order(config: PretrainConfig, encoder: Encoder) -> None:
    """Refuse own negatives in another order of frames if the encoder gives them the query's own features.

    Raises:
        UserError: each query would be pushed away from its own embedding.
    """
    own = config.objective.own_negatives
    head = encoder.over_time if isinstance(encoder, TemporalEncoder) else None
    if own in ("shuffle", "reverse") and head is not None and not head.sees_order:
        raise UserError(
            f"objective.own_negatives={own}: encoder.temporal={config.encoder.temporal} does not see the "
            "order of frames, so each query would be pushed away from itself; use "
            "encoder.temporal=attention or nuta, or objective.own_negatives=freeze, clips or none"
        )


def check_order(config: PretrainConfig, plan: Plan) -> None:
    """Refuse a bank or a look-up that an order composed from the bank cannot work with.

    Raises:
        UserError: the bank has no key of each row on each rank, or coming steps would be looked up.
    """
    if not isinstance(plan.order, BankOrder):
        return
    given = f"data.order={config.data.order} composes each epoch from the bank at the end of the one before"
    if config.bank.kind == "queue" or config.bank.placement != "replicated":
        raise UserError(
            f"{given}: with bank.kind={config.bank.kind} and bank.placement={config.bank.placement} "
            "no process has the keys of all rows; use bank.kind=dataset and bank.placement=replicated"
        )
    if config.mining.query == "stored":
        raise UserError(
            f"{given}: mining.query=stored cannot look the next epoch up ahead; use mining.query=fresh"
        )


def warn_of_settings(
    config: PretrainConfig, plan: Plan, miner: Miner, method: Callable[..., Any], name: str
) -> None:
    """Warn of settings that nothing reads, that others overrule, or that the run is too short for.

    Args:
        config: The run.
        plan: Its length, which a time budget leaves open; nothing is too short then.
        miner: Its miner.
        method: See ``check_method``.
        name: See ``check_method``.
    """
    mines = takes_from_bank(method, miner.method)
    slots = config.bank.capacity or plan.rows
    young = (config.bank.max_age or slots) * config.data.global_batch
    lines = unread(config, method, name, miner.method, plan.order)
    lines += overruled(config.mining, min(slots, young)) if mines else []
    lines += _left_out(plan)
    if plan.has_end:
        lines += too_short_for(config, plan, mines=mines, approximate=miner.retrieval.approximate)
    for line in lines if is_first_rank() else ():
        logger.warning("%s", line)


def _left_out(plan: Plan) -> list[str]:
    """Say how many images have no place in the whole batches of an epoch, if it is more than a quarter."""
    left_out = plan.rows % plan.global_batch
    if left_out <= plan.rows / 4:
        return []
    even = plan.rows // math.ceil(plan.rows / plan.global_batch)
    return [
        f"data.global_batch={plan.global_batch} leaves {left_out} of {plan.rows} images out of each epoch, "
        f"others each time; a smaller one leaves out fewer, {even} leaves out {plan.rows % even}"
    ]


def tell_busy(device: torch.device) -> None:
    """Say if other processes keep the processors busy, on which steps are shared among several threads."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1 and is_first_rank():
        logger.info(
            "this machine is busy (load %.0f on %d processors): with OMP_NUM_THREADS=1 a step may be faster",
            *(load, cores),
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means too little memory; each device type raises its own exception."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    )

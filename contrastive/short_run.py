"""Find settings that need more optimizer steps than the run has, so that they never take effect."""

import math

import torch

from contrastive.config import PretrainConfig
from contrastive.data.plan import Plan
from memory_bank.config import BankConfig


def steps_to_fill(plan: Plan, bank: BankConfig, min_fill: float) -> int | None:
    """Count the optimizer steps after which the bank is filled to ``min_fill``, if every image can be read.

    Returns:
        The step after these is the first that mines the bank. For a queue this may be more than the plan has;
        None if the plan leaves too many rows of a data set bank unseen.
    """
    if bank.kind == "queue":
        assert bank.capacity is not None
        return math.ceil(min_fill * bank.capacity / plan.global_batch - 1e-9)
    wanted = math.ceil(min_fill * plan.rows - 1e-9)
    if wanted <= plan.steps_per_epoch * plan.global_batch:
        return math.ceil(wanted / plan.global_batch)
    seen = torch.zeros(plan.rows, dtype=torch.bool)
    assert plan.epochs is not None
    for epoch in range(plan.epochs):
        ids = plan.epoch_ids(epoch)
        filled = seen.sum() + (~seen[ids]).cumsum(0)
        if filled[-1] >= wanted:
            position = int(torch.searchsorted(filled, wanted))
            return epoch * plan.steps_per_epoch + position // plan.global_batch + 1
        seen[ids] = True
    return None


def too_short_for(config: PretrainConfig, plan: Plan, *, mines: bool, approximate: bool) -> list[str]:
    """List the settings for which the run is too short, one line each, with the setting to change.

    Args:
        config: The run.
        plan: The run's length, which is known. An early ``trainer.max_steps`` is ignored: the run can be
            continued.
        mines: Whether the objective takes its negatives from the bank.
        approximate: Whether the bank is searched by an approximate index.
    """
    lines = [_warm_up(config, plan), _freeze(config, plan)]
    if mines:
        lines += [_fill(config, plan), _lag(config), _ring(config, plan)]
        lines += [_recall(config, plan)] if approximate else []
    return [line for line in lines if line]


def _fill(config: PretrainConfig, plan: Plan) -> str:
    bank, min_fill, total = config.bank, config.mining.min_fill, plan.total_steps
    needed = steps_to_fill(plan, bank, min_fill)
    if needed is not None and needed < total:
        return ""
    when = f"after {needed} optimizer steps" if needed is not None else "never"
    rows = (total - 1) * plan.global_batch  # written before the last step
    if bank.kind == "queue":
        remedy = f"lower bank.capacity to {math.floor(rows / min_fill)} or less"
    else:
        share = min(rows, plan.steps_per_epoch * plan.global_batch) / plan.rows
        remedy = f"lower mining.min_fill to {math.floor(1000 * share) / 1000:g} or less"
    slots = plan.rows if bank.capacity is None else bank.capacity
    return (
        f"the bank is never mined: its {slots} slots are filled to mining.min_fill={min_fill:g} {when}, the "
        f"run has {total} steps, and until then negatives come from the batch; "
        f"{remedy + ', or ' if rows else ''}raise {_length(config)}"
    )


def _lag(config: PretrainConfig) -> str:
    age, lag = config.bank.max_age, config.mining.lag
    if config.mining.query != "stored" or age is None or age >= lag:
        return ""
    return (
        f"no hard negative is ever found: keys are used up to an age of bank.max_age={age} steps and looked "
        f"up mining.lag={lag} steps ahead; set mining.lag to {age} or less, or raise bank.max_age"
    )


def _ring(config: PretrainConfig, plan: Plan) -> str:
    if config.mining.band_end is None or config.mining.band_steps <= plan.total_steps:
        return ""
    return (
        f"mining.band_end is never reached: the band moves over mining.band_steps={config.mining.band_steps} "
        f"steps, the run has {plan.total_steps}; lower mining.band_steps to {plan.total_steps} or less"
    )


def _warm_up(config: PretrainConfig, plan: Plan) -> str:
    warmup = config.schedule.warmup_steps(plan.steps_per_epoch, plan.total_steps)
    if warmup < plan.total_steps:
        return ""
    return (
        f"the learning rate never falls: schedule.warmup_epochs={config.schedule.warmup_epochs:g} takes all "
        f"{plan.total_steps} steps of the run; lower it, or raise schedule.epochs"
    )


def _freeze(config: PretrainConfig, plan: Plan) -> str:
    epochs = config.encoder.freeze_epochs
    if config.schedule.minutes is not None or round(epochs * plan.steps_per_epoch) < plan.total_steps:
        return ""
    return (
        f"the encoder is never trained: encoder.freeze_epochs={epochs:g} takes all {plan.total_steps} steps "
        "of the run; lower it, or raise schedule.epochs"
    )


def _recall(config: PretrainConfig, plan: Plan) -> str:
    every, total = config.mining.recall_every, plan.total_steps
    begin = steps_to_fill(plan, config.bank, config.mining.min_fill)
    if not every or begin is None or begin >= total:
        return ""
    # The index is checked after each write, starting with the one that fills the bank.
    first = max(0, begin - 1)
    if -(-first // every) * every < total:
        return ""
    return (
        f"the recall of the approximate index is never measured: mining.recall_every={every}, the run has "
        f"{total} steps; lower mining.recall_every to {max(1, first)} or less"
    )


def _length(config: PretrainConfig) -> str:
    """Name the setting that makes the run longer."""
    return "schedule.epochs" if config.schedule.minutes is None else "schedule.minutes"

"""Settings against the length of a run; nothing is trained here."""

import pytest

from contrastive.config import DataConfig, PretrainConfig, ScheduleConfig
from contrastive.config_files import load_config, recipes
from contrastive.data.plan import Plan
from contrastive.short_run import steps_to_fill, too_short_for
from memory_bank.backend import EXACT_ROWS_CPU
from memory_bank.config import BankConfig, MiningConfig


def make(rows=1335, batch=16, epochs=3, **groups):
    schedule = ScheduleConfig(epochs=epochs, warmup_epochs=groups.pop("warmup", 0.0))
    config = PretrainConfig(data=DataConfig(global_batch=batch), schedule=schedule, **groups)
    return config, Plan(rows, 0, batch, epochs)


def bank(**settings):
    return BankConfig(**settings)


def mining(**settings):
    return MiningConfig(**settings)


def lines(config, plan, *, mines=True, approximate=False):
    return too_short_for(config, plan, mines=mines, approximate=approximate)


@pytest.mark.parametrize(
    ("rows", "batch", "min_fill"), [(63, 16, 1.0), (40, 16, 0.9), (64, 16, 0.5), (9, 8, 0.2)]
)
def test_a_data_set_bank_is_full_after_the_steps_that_were_computed(rows, batch, min_fill):
    _, plan = make(rows, batch, epochs=20)
    seen: set[int] = set()
    for step in range(plan.total_steps):
        seen |= set(plan.ids(step).tolist())
        if len(seen) >= min_fill * rows:
            break
    assert steps_to_fill(plan, bank(), min_fill) == step + 1


def test_a_data_set_bank_that_the_plan_never_fills():
    _, plan = make(rows=63, epochs=1)
    assert steps_to_fill(plan, bank(), 1.0) is None
    assert steps_to_fill(plan, bank(), 0.0) == 0


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_capacity_that_is_named_is_the_largest_that_is_mined(epochs):
    config, plan = make(epochs=epochs, bank=bank(kind="queue", capacity=65536))
    (line,) = lines(config, plan)
    assert "bank.capacity" in line
    assert f"after 2048 optimizer steps, the run has {plan.total_steps} steps" in line
    largest = (plan.total_steps - 1) * 16 * 2
    assert f"lower bank.capacity to {largest} or less" in line
    config.bank.capacity = largest
    assert lines(config, plan) == []
    config.bank.capacity = largest + 1
    assert len(lines(config, plan)) == 1
    assert lines(config, plan, mines=False) == []


def test_the_share_that_is_named_is_mined():
    config, plan = make(rows=63, epochs=1, mining=mining(min_fill=1.0))
    (line,) = lines(config, plan)
    assert "63 slots are filled to mining.min_fill=1 never" in line
    assert "lower mining.min_fill to 0.507 or less, or raise schedule.epochs" in line
    config.mining.min_fill = 0.507
    assert lines(config, plan) == []
    config, plan = make(rows=16, epochs=1)
    assert lines(config, plan)[0].endswith("negatives come from the batch; raise schedule.epochs")


def test_look_ups_further_ahead_than_keys_live_are_named():
    config, plan = make(bank=bank(max_age=1), mining=mining(query="stored", lag=2))
    (line,) = lines(config, plan)
    assert "set mining.lag to 1 or less, or raise bank.max_age" in line
    config.bank.max_age = 2
    assert lines(config, plan) == []


def test_a_band_that_does_not_arrive_and_a_warm_up_that_does_not_end_are_named():
    config, plan = make(mining=mining(band_end=[0.0, 0.1], band_steps=250), warmup=3.0)
    warm_up, ring = lines(config, plan)
    assert "schedule.warmup_epochs=3 takes all 249 steps" in warm_up
    assert "lower mining.band_steps to 249 or less" in ring
    config.mining.band_steps, config.schedule.warmup_epochs = 249, 2.9
    assert lines(config, plan) == []


def test_a_recall_that_is_never_measured_is_named():
    config, plan = make(mining=mining(recall_every=500))
    assert lines(config, plan) == []
    (line,) = lines(config, plan, approximate=True)
    assert "lower mining.recall_every to 41 or less" in line  # half of 1,335 rows are in after 42 steps of 16
    config.mining.recall_every = 41
    assert lines(config, plan, approximate=True) == []


def test_an_encoder_that_stays_frozen_is_named():
    config, plan = make()
    config.encoder.freeze_epochs = plan.total_steps / plan.steps_per_epoch - 0.001
    (line,) = lines(config, plan)
    assert f"takes all {plan.total_steps} steps of the run" in line
    config.encoder.freeze_epochs -= 1
    assert lines(config, plan) == []


@pytest.mark.parametrize("rows", [1335, 50_000, 1_281_167])
def test_shipped_recipes_are_long_enough(rows):
    for recipe in recipes("pretrain"):
        config = load_config(PretrainConfig, "pretrain", recipe, ["data.root=x"])
        if config.data.global_batch * 4 > rows:
            continue
        plan = Plan(rows, 0, config.data.global_batch, config.schedule.epochs)
        mines, approximate = config.method != "simclr", rows > EXACT_ROWS_CPU
        assert lines(config, plan, mines=mines, approximate=approximate) == [], recipe

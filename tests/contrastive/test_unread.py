"""Settings that nothing reads: named, with what would read them; and silence wherever all are read."""

import logging
from importlib import resources

import pytest

from contrastive.config import PretrainConfig
from contrastive.config_files import load_config, recipes
from contrastive.data.order.neighbours import NeighbourOrder
from contrastive.fit_checks import warn_of_settings
from contrastive.methods.build import find_method
from contrastive.registry import OBJECTIVES
from contrastive.unread import unread
from memory_bank.methods.base import MiningMethod, method_of
from memory_bank.registry import METHODS
from tests import tiny

PRESETS = sorted(each.name for each in (resources.files("configs") / "pretrain" / "mining").iterdir())
PRESETS = [name.removesuffix(".yaml") for name in PRESETS if name.endswith(".yaml")]


def lines(*overrides, recipe=None, order=None, method=None):
    config = load_config(PretrainConfig, "pretrain", recipe, overrides)
    method = method or find_method(config)
    return unread(config, method, config.method, method_of(config.mining), order)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            [
                "mining.method=full_bank",
                "mining.false_negative=drop",
                "mining.num_hard=9",
                "mining.refill=false",
            ],
            [
                "mining.refill=False and mining.false_negative=drop have no effect with "
                "mining.method=full_bank; mining.method=ranked reads them",
            ],
        ),
        (
            [
                "mining.method=all_rows",
                "mining.num_hard=9",
                "mining.band=[0.1,0.2]",
                "mining.class_prior=0.1",
            ],
            [
                "mining.num_hard=9 has no effect with mining.method=all_rows; mining.method=ranked and "
                "mining.method=full_bank read it",
                "mining.band=[0.1, 0.2] and mining.class_prior=0.1 have no effect with "
                "mining.method=all_rows; mining.method=ranked reads them",
            ],
        ),
        (
            ["method=simclr", "mining.method=full_bank", "mining.class_prior=0.1", "mining.min_fill=0.1"],
            [
                "mining.method=full_bank and mining.class_prior=0.1 have no effect with method=simclr, which "
                "takes no negatives from the bank; method=moco and method=neighbour read them",
            ],
        ),
        (
            ["objective.beta=3", "objective.sigma=9", "objective.tau_plus=0.1", "objective.temperature=1"],
            [
                f"{setting} has no effect with objective.name=info_nce and method=moco; {readers} it"
                for setting, readers in (
                    ("objective.tau_plus=0.1", "objective.name=debiased and objective.name=hcl read"),
                    ("objective.beta=3.0", "objective.name=hcl reads"),
                    ("objective.sigma=9.0", "objective.name=dclw reads"),
                )
            ],
        ),
        (
            ["objective.name=mixing", "objective.mix_pairs=7", "objective.gamma=0.5"],
            [
                "objective.gamma=0.5 has no effect with objective.name=mixing and method=moco; "
                "method=sogclr reads it",
            ],
        ),
    ],
)
def test_they_are_named_with_what_would_read_them(given, expected):
    assert lines(*given) == expected


@pytest.mark.parametrize(
    "given",
    [
        ["mining.class_prior=0.1", "mining.false_negative=drop", "mining.backend=exact"],
        ["mining.method=full_bank", "mining.num_hard=9", "mining.num_uniform=9", "mining.nprobe=3"],
        ["method=simclr", "objective.name=hcl", "objective.beta=2", "mining.class_prior=0.1"],
        ["method=simclr", "objective.name=debiased", "objective.tau_plus=0.1"],
        ["method=sogclr", "objective.gamma=0.5"],
        [
            "objective.name=mixing",
            "objective.mix_hardest=9",
            "objective.mix_pairs=9",
            "objective.mix_query=9",
        ],
    ],
)
def test_settings_that_are_read_are_not(given):
    assert lines(*given) == []


def test_a_tau_plus_that_is_stated_takes_the_place_of_the_class_prior():
    given = ["method=simclr", "objective.name=hcl", "objective.tau_plus=0.1", "mining.class_prior=0.2"]
    assert lines(*given)[0].startswith("mining.class_prior=0.2 has no effect with method=simclr")


def test_an_order_from_the_bank_reads_the_class_prior():
    order = NeighbourOrder(8, 0, PretrainConfig().data.neighbours, 0.1)
    given = ["method=simclr", "mining.class_prior=0.1", "mining.num_hard=9"]
    assert lines(*given, order=order)[0].startswith("mining.num_hard=9 has no effect")


@pytest.mark.parametrize("recipe", recipes("pretrain"))
def test_no_shipped_recipe_has_any(recipe):
    assert lines(recipe=recipe) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_of_mining_has_any(preset):
    assert lines(f"mining={preset}") == []


def test_a_mining_method_of_ones_own_reads_all_unless_it_declares_what(monkeypatch):
    own = type("Own", (MiningMethod,), {"negatives": None, "__abstractmethods__": frozenset()})
    monkeypatch.setitem(METHODS, "own", own)
    given = ["mining.method=own", "mining.band=[0.1,0.2]"]
    assert lines(*given) == []
    monkeypatch.setattr(own, "reads", frozenset({"num_hard"}))
    assert lines(*given) == [
        "mining.band=[0.1, 0.2] has no effect with mining.method=own; mining.method=ranked reads it"
    ]


def build(settings, beta):
    """Build a loss with a setting of hcl's name."""


def test_a_loss_of_ones_own_declares_them_by_its_arguments(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "own", f"{__name__}:build")
    assert lines("objective.name=own", "objective.beta=3") == []
    assert lines("objective.beta=3")[0].endswith("; objective.name=hcl and objective.name=own read it")


def test_a_function_that_builds_a_method_may_read_any_setting_of_the_objective():
    assert lines("objective.beta=3", method=lambda parts: None) == []
    assert lines("mining.method=all_rows", "mining.refill=false", method=lambda parts: None)


def test_a_run_warns_of_them(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("contrastive"), "propagate", True)
    module = tiny.module("mining=full_bank", "mining.band=[0.1,0.2]")
    warn_of_settings(module.config, module.plan, module.method.miner, type(module.method), "moco")
    assert "mining.band=[0.1, 0.2]" in caplog.text

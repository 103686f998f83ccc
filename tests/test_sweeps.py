"""The shipped sweeps, expanded by W&B's own code as its agent does, go through the command line."""

import configparser
import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def read(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def values_of(parameter):
    """All values, or the ends of the range."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def command_of(sweep, chosen):
    """What the agent starts (wandb/wandb_agent.py, ``Agent._command_run``)."""
    from wandb.sdk.launch.sweeps import utils

    args = utils.create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in chosen.items()}}
    )
    macros = {**args, "program": [sweep["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    return [
        text
        for part in utils.create_sweep_command([*sweep["command"]])
        for text in (macros[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part])
    ]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_reaches_the_config(path, monkeypatch, capsys):
    from contrastive.__main__ import main, parse
    from contrastive.config import PretrainConfig
    from contrastive.config_files import load_config

    sweep = read(path)
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    names = sweep["parameters"]
    for values in itertools.zip_longest(*map(values_of, names.values())):
        chosen = {
            name: values_of(names[name])[-1] if value is None else value
            for name, value in zip(names, values, strict=True)
        }
        env, program, *arguments = command_of(sweep, chosen)
        assert (env, program) == ("/usr/bin/env", "contrastive-pretrain")
        recipe, flags, overrides = parse(arguments)
        assert not flags
        config = load_config(PretrainConfig, "pretrain", recipe, overrides)
        assert config.run.name == "sweep/trial7"  # trials do not share a run directory
        for name, value in chosen.items():
            found = config
            for part in name.split("."):
                found = getattr(found, part)
            assert found == value, name
    assert main([*arguments, "--print-config"]) == 0
    assert "trial7" in capsys.readouterr().out


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_starts_a_command_and_follows_a_metric_that_exist(path):
    from contrastive.logging.names import METRICS

    sweep = read(path)
    assert sweep["metric"]["name"] in METRICS
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"{sweep['program']} = " in setup["options.entry_points"]["console_scripts"]


def test_there_is_one():
    assert SWEEPS


def test_the_id_of_a_trial_becomes_that_of_its_run(monkeypatch):
    from contrastive.run_dir import provenance

    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    assert provenance()["wandb_id"] == "trial7"
    monkeypatch.delenv("WANDB_RUN_ID")
    first, second = provenance()["wandb_id"], provenance()["wandb_id"]
    assert first != second

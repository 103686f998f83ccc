"""Composition, overrides, and errors that name what was given, what is allowed and what to do."""

import pytest

from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import differences, load_config, load_saved, recipes, to_yaml


def load(*overrides, recipe="digits"):
    return load_config(PretrainConfig, "pretrain", recipe, overrides)


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path):
    names = recipes("pretrain")
    shipped = {
        "cifar10",
        "cifar10_fast",
        "digits",
        "imagefolder",
        "imagenet_resnet50",
        "simclr_cifar10",
        "stl10",
    }
    assert set(names) == shipped
    for name in names:
        loaded = load(recipe=name)
        (tmp_path / "config.yaml").write_text(to_yaml(loaded))
        assert load_saved(PretrainConfig, tmp_path / "config.yaml") == loaded


def test_overrides_win_over_groups_and_groups_over_the_recipe():
    recipe = load()
    grouped = load("augment.view_1.flip=0.25", "augment=cifar")
    assert grouped.augment.view_1.flip == 0.25
    assert grouped.augment.view_1.jitter == 0.8
    assert recipe.augment.view_1.jitter == 0.0
    assert load("--optimizer.base_lr=1e-3").optimizer.base_lr == 1e-3


def test_a_second_view_follows_the_first_until_told_otherwise():
    loaded = load("augment.view_1.blur=0.4", "augment.view_2.noise=0.9")
    assert loaded.augment.view_2.blur == 0.4
    assert (loaded.augment.view_1.noise, loaded.augment.view_2.noise) != (0.9, 0.9)


def test_a_users_file_builds_on_a_shipped_recipe_and_on_its_neighbours(tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [cifar10]\nschedule: {epochs: 7, warmup_epochs: 1}\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base]\noptimizer: {base_lr: 0.5}\n")
    loaded = load(recipe=str(tmp_path / "mine.yaml"))
    assert (loaded.schedule.epochs, loaded.optimizer.base_lr) == (7, 0.5)
    assert loaded.encoder == load(recipe="cifar10").encoder


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.bse_lr=1", ["optimizer.bse_lr", "did you mean 'optimizer.base_lr'", "weight_decay"]),
        ("optimzer.base_lr=1", ["optimzer", "did you mean 'optimizer'"]),
        ("schedule.epochs=many", ["schedule.epochs", "many", "Integer"]),
        ("schedule.epochs=0", ["schedule.epochs=0", "1 to 1000000"]),
        ("objective.temperature=0", ["temperature=0", "more than 0"]),
        ("mining.band=[0.5,0.1]", ["mining.band=[0.5, 0.1]", "low < high"]),
        ("augment=cifr", ["augment/cifr", "did you mean 'cifar'"]),
        ("epochs", ["'epochs'", "key=value"]),
        ("encoder.batch_norm=splitt", ["encoder.batch_norm='splitt'", "plain, split, shuffle, sync"]),
        ("run.name=../elsewhere", ["../elsewhere", "run.root"]),
        ('run.name="a\\0b"', ["run.name='a\\x00b'", "no file's name"]),
        ('data.cache="a\\0b"', ["data.cache='a\\x00b'", "no file's name"]),
        ("data.root=a\udcff", ["data.root=a\\udcff", "not UTF-8", "a link whose name is"]),
        ("logging.wandb.mode=", ["logging.wandb.mode: nothing given", "a value is needed"]),
        ("run.seed.x=1", ["run.seed: a value is needed, run.seed=VALUE", "no keys below"]),
        ("data.mean=[a,1,1]", ["data.mean[0]: Value 'a'", "Float"]),
        ("augment.view_1.noise_std=2e9", ["noise_std=2000000000.0", "0 to 1"]),
        ("augment.view_1.shear=90", ["shear=90", "0 to 89"]),
        ("augment.view_1.rotate=360", ["rotate=360", "0 to 180"]),
        ("data.mean[0]=1", ["data.mean[0]=1: Cannot merge"]),
        ("data.mean=5", ["data.mean: a list is needed, e.g. data.mean=[1,2]"]),
        (f"optimizer.base_lr={'1' * 400}", ["optimizer.base_lr=111", "too large to convert"]),
        ("encoder.predictor_hidden=2000000000", ["predictor_hidden=2000000000", "0 to 65536"]),
        ("data.mean=[1,2]", ["data.mean=[1.0, 2.0]", "three"]),
        ("bank.kind=queue", ["bank.capacity", "65536"]),
        ("mining.overlap=true", ["mining.query=stored"]),
        ("logging.wandb.project='a/b?c'", ["logging.wandb.project='a/b?c'", "none of"]),
        (f"logging.wandb.tags=[ok,{'t' * 65}]", ["logging.wandb.tags", "65 characters", "1 to 64"]),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(override, parts):
    with pytest.raises(UserError) as error:
        load(override)
    for part in parts:
        assert part in str(error.value)


def test_a_yaml_file_with_a_number_for_a_group_is_named(tmp_path):
    (tmp_path / "five.yaml").write_text("data: 5\n")
    with pytest.raises(UserError, match=r"five.yaml: .*DataConfig"):
        load("schedule.epochs=9", recipe=str(tmp_path / "five.yaml"))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load(recipe="cifar")
    with pytest.raises(UserError, match="no such file"):
        load(recipe="missing.yaml")


def test_a_saved_config_with_an_interpolation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    text = to_yaml(load()).replace("name: digits", "name: ${oc.env:SECRET}", 1)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="interpolation"):
        load_saved(PretrainConfig, tmp_path / "config.yaml")


def test_a_saved_number_that_no_float_holds_is_refused(tmp_path):
    text = to_yaml(load()).replace("min_fill: ", f"min_fill: {'9' * 400} #", 1)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml: .*too large to convert"):
        load_saved(PretrainConfig, tmp_path / "config.yaml")


def test_differences_are_named_by_their_dotted_path():
    old, new = load(), load("augment.view_2.hue=0.3", "run.seed=5")
    assert differences(old, new) == {
        "run.seed": (0, 5),
        "augment.view_2.hue": (old.augment.view_2.hue, 0.3),
    }

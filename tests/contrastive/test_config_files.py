"""Composition, overrides, and errors that name what was given, what is allowed and what to do."""

import pytest

from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import differences, load_config, load_saved, recipes, to_yaml
from contrastive.export.config import ExportConfig
from eval.knn import KnnEvaluation
from eval.report.write import ReportEvaluation


def load(*overrides, recipe="digits"):
    return load_config(PretrainConfig, "pretrain", recipe, overrides)


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path):
    names = recipes("pretrain")
    shipped = {
        "cifar10",
        "cifar10_cpu",
        "cifar10_fast",
        "clips",
        "digits",
        "hybrid_cifar10",
        "identities",
        "imagefolder",
        "imagenet_resnet50",
        "imagenet_vit_small",
        "kinetics_r3d18",
        "moving_digits",
        "own",
        "simclr_cifar10",
        "stl10",
        "vit_cifar10",
        "vit_imagefolder",
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


def test_a_users_file_builds_on_another_by_its_whole_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "base.yaml").write_text("defaults: [digits]\nrun: {name: base}\n")
    (tmp_path / "mine.yaml").write_text(f"defaults: [{tmp_path}/a/base.yaml]\noptimizer: {{base_lr: 0.5}}\n")
    loaded = load(recipe=str(tmp_path / "mine.yaml"))
    assert (loaded.run.name, loaded.data.name, loaded.optimizer.base_lr) == ("base", "digits", 0.5)


@pytest.mark.parametrize(
    ("overrides", "name", "args"),
    [
        (["encoder.args.features=64"], "cpu_resnet", {"widths": [32, 64], "features": 64, "grid": 3}),
        (["encoder.name=cpu_resnet"], "cpu_resnet", {"widths": [32, 64], "features": 32, "grid": 3}),
        (["encoder.name=resnet10"], "resnet10", {}),
        (["encoder.args.patch_size=4", "encoder.name=vit_tiny"], "vit_tiny", {"patch_size": 4}),
        (["encoder.args={}"], "cpu_resnet", {}),
        (["encoder.args=null"], "cpu_resnet", {}),
    ],
)
def test_arguments_are_of_the_network_that_is_named(overrides, name, args):
    encoder = load(*overrides, recipe="moving_digits").encoder
    assert (encoder.name, encoder.args) == (name, args)


def test_a_recipe_that_names_another_network_or_head_drops_the_arguments_below_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [identities, clips]\nencoder: {temporal: nuta, temporal_args: {dim: 9}}\n")
    encoder = load(recipe=str(recipe)).encoder
    assert (encoder.name, encoder.args, encoder.temporal_args) == ("torchvision:resnet18", {}, {"dim": 9})
    assert load("encoder.temporal=mean", recipe=str(recipe)).encoder.temporal_args == {}
    recipe.write_text("encoder: {args: {zero_init: true}}\n")  # of the default network
    assert load("encoder.name=resnet18", recipe=str(recipe)).encoder.args == {"zero_init": True}
    recipe.write_text("run: {name: vit}\nencoder: {name: '${run.name}', args: {a: 1}}\n")
    assert load("run.name=vit_tiny", recipe=str(recipe)).encoder.args == {"a": 1}


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
        ("run.name=.", ["run.name='.'", "a folder below run.root is needed"]),
        ("run.name=./", ["run.name='./'", "a folder below run.root is needed"]),
        ("run.name=/a", ["run.name='/a'", "a folder below run.root is needed"]),
        ("run.name=''", ["run.name=''", "a folder below run.root is needed"]),
        ("run.name=???", ["run.name=???", "still to be set"]),
        ("run.seed=???", ["run.seed=???", "still to be set"]),
        ('run.name="a\\0b"', ["run.name='a\\x00b'", "no file's name"]),
        ('data.cache="a\\0b"', ["data.cache='a\\x00b'", "no file's name"]),
        ("data.root=a\udcff", ["data.root=a\\udcff", "not UTF-8", "a link with a UTF-8 name"]),
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
        ("logging.wandb.tags=010", ["logging.wandb.tags: a list is needed"]),
        ("mining=010", ["'mining/010': unknown"]),
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


@pytest.mark.parametrize(
    ("method", "loss", "now"),
    [
        ("auto", "nt_xent", ("simclr", "info_nce")),
        (None, "nt_xent", ("simclr", "info_nce")),
        ("simclr", "nt_xent", ("simclr", "info_nce")),
        ("auto", "nnclr", ("nnclr", "info_nce")),
        ("auto", "neighbour_info_nce", ("neighbour", "neighbour_info_nce")),
        ("auto", "dcl", ("moco", "dcl")),
        ("null", "info_nce", ("moco", "info_nce")),
    ],
)
def test_a_saved_config_may_name_the_method_by_its_loss(tmp_path, method, loss, now):
    """Runs of before: ``auto`` was the default of ``method``, and before that there was none."""
    text = to_yaml(load()).replace("name: info_nce", f"name: {loss}")
    text = text.replace("method: moco\n", "" if method is None else f"method: {method}\n")
    file = tmp_path / "config.yaml"
    file.write_text(f"{text}provenance:\n  commit: unknown\n")
    for found in (load_saved(PretrainConfig, file), load(recipe=str(file))):
        assert (found.method, found.objective.name) == now
        assert differences(found, load(f"method={now[0]}", f"objective.name={now[1]}")) == {}


@pytest.mark.parametrize(
    "text", ["objective: [1]", "objective: {name: [nnclr]}", "objective: {name: {a: 1}}"]
)
def test_a_saved_loss_that_is_no_name_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: .*(objective|Objective)"):
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


NUMBERS = ["3e10482", "4e20913", "010", "12:30:00", "2026_11_29", "2026-11-29", "yes", "1.10", "0x1f", "~"]
"""Texts that yaml reads as a number, a truth value, a time, or nothing."""

TEXTS = {
    "run.name": PretrainConfig,
    "data.cache": PretrainConfig,
    "data.root": PretrainConfig,
    "encoder.weights": PretrainConfig,
    "logging.wandb.entity": PretrainConfig,
    "checkpoint": KnnEvaluation,
    "out": KnnEvaluation,
    "device": ExportConfig,
}


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def load_text(schema, *overrides):
    folder, recipe, needed = {
        PretrainConfig: ("pretrain", "digits", []),
        KnnEvaluation: ("eval", "knn", ["checkpoint=a"]),
        ReportEvaluation: ("eval", "report", ["checkpoint=a"]),
        ExportConfig: ("export", "export", ["checkpoint=a", "format=onnx", "out=a.onnx"]),
    }[schema]
    return load_config(schema, folder, recipe, [*needed, *overrides])


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_setting_keeps_the_characters_typed(key):
    for typed in [text for text in NUMBERS if text != "~"] + ["a #1", "a: b", "[a]", "{a}"]:
        assert value_of(load_text(TEXTS[key], f"{key}={typed}"), key) == typed
    assert value_of(load_text(TEXTS[key], f"--{key}=1.10"), key) == "1.10"


def test_text_may_be_quoted_and_null_stays_null():
    assert load('run.name="a\\x20b"').run.name == "a b"
    assert load("run.name='null'").run.name == "null"
    assert load("data.cache=null").data.cache is None
    assert load("data.cache=").data.cache is None
    assert load('data.cache="null"').data.cache == "null"


def test_the_elements_of_a_list_of_text_keep_theirs():
    texts = [text for text in NUMBERS if text != "~"]
    assert load(f"logging.wandb.tags=[{','.join(texts)},'a, b']").logging.wandb.tags == [*texts, "a, b"]
    assert load("logging.wandb={tags: [1e5], project: 010}").logging.wandb.tags == ["1e5"]
    assert load_text(ReportEvaluation, "compare=[1e3,010]").compare == ["1e3", "010"]


def test_a_number_stays_one_where_the_schema_has_no_text():
    assert load("run.seed=0x1f").run.seed == 31
    assert load("trainer.max_steps=12").trainer == {"max_steps": 12}
    assert load("mining.band=[0,1e-3]").mining.band == [0, 0.001]


def test_a_choice_that_yaml_reads_as_a_truth_value_is_taken():
    assert load("mining.false_negative=off").mining.false_negative == "off"
    assert load("run.compile=True").run.compile == "true"


def test_unquoted_text_in_a_file_keeps_its_characters(tmp_path):
    file, option = tmp_path / "mine.yaml", tmp_path / "more.yaml"
    file.write_text(
        "defaults: [digits]\nrun: {name: 010, root: ~}\ndata: &d {root: 1e3}\nencoder: {weights: 0x1f}\n"
        "logging: {every_n_steps: 0x10, wandb: {tags: [1.10, yes], entity: null}}\n"
    )
    with pytest.raises(UserError, match=r"run\.root: nothing given"):
        load(recipe=str(file))
    option.write_text(file.read_text().replace(", root: ~", ""))
    loaded = load(recipe=str(option))
    assert (loaded.run.name, loaded.data.root, loaded.encoder.weights) == ("010", "1e3", "0x1f")
    assert (loaded.logging.wandb.tags, loaded.logging.wandb.entity) == (["1.10", "yes"], None)
    assert loaded.logging.every_n_steps == 16


def test_a_view_may_follow_the_other_from_the_command_line():
    loaded = load("augment.view_2=${augment.view_1}", "augment.view_1.hue=0.3")
    assert loaded.augment.view_2 == loaded.augment.view_1


PATHS = [key for key in TEXTS if key in ("data.cache", "data.root", "encoder.weights", "checkpoint", "out")]


@pytest.mark.parametrize("key", [*PATHS, "run.root"])
def test_every_path_setting_expands_the_home_folder_and_loses_a_last_slash(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    schema = TEXTS.get(key, PretrainConfig)
    assert value_of(load_text(schema, f"{key}=~/x"), key) == "/home/someone/x"
    assert value_of(load_text(schema, f"{key}=~"), key) == "/home/someone"
    assert value_of(load_text(schema, f"{key}=./~/x"), key) == "./~/x"
    assert value_of(load_text(schema, f"{key}=x//"), key) == "x"
    assert value_of(load_text(schema, f"{key}=/"), key) == "/"
    with pytest.raises(UserError, match=f"{key}=~nosuchuser/x: the home folder of ~nosuchuser is not known"):
        load_text(schema, f"{key}=~nosuchuser/x")


@pytest.mark.parametrize("key", [*PATHS, "run.root", "run.name"])
def test_a_path_that_is_too_long_for_a_file_is_refused(key):
    schema = TEXTS.get(key, PretrainConfig)
    with pytest.raises(UserError, match=f"{key}=ü+..ü+: a name of 256 bytes, 255 are possible; shorten it"):
        load_text(schema, f"{key}=x/{'ü' * 128}/y")
    with pytest.raises(UserError, match=f"{key}=.*: a path of 4096 bytes, 4095 are possible"):
        load_text(schema, f"{key}={'x/' * 2047}xx")
    assert value_of(load_text(schema, f"{key}=x/{'x' * 255}"), key) == f"x/{'x' * 255}"


def test_a_url_may_be_longer_than_a_path_and_a_recipe_may_not():
    url = f"https://host/set?signature={'x' * 300}"
    assert load(f"data.root={url}", "data.name=shards").data.root == url
    with pytest.raises(UserError, match=r"config=xx.*a name of 300 bytes"):
        load(recipe="x" * 300)


def test_paths_of_a_report_of_an_export_and_of_a_config_expand_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_text(ReportEvaluation, "compare=[~/a]").compare == [f"{tmp_path}/a"]
    assert load_text(KnnEvaluation, "data.root=~/a").data.root == f"{tmp_path}/a"
    assert load_text(ExportConfig, "out=~/a.onnx").out == f"{tmp_path}/a.onnx"
    (tmp_path / "mine.yaml").write_text("defaults: [digits]\nrun: {name: mine}\n")
    assert load(recipe="~/mine.yaml").run.name == "mine"

"""Every shipped recipe: what its header promises to say, what its numbers mean, and steps of it."""

import json
import re
from importlib import resources

import pytest
import torch

from contrastive.__main__ import main
from contrastive.config import PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.plan import Plan
from contrastive.fit_checks import check_views
from contrastive.methods.build import find_method
from memory_bank.miner import build_miner
from memory_bank.policy import overruled
from tests import tiny

FOLDER = resources.files("configs") / "pretrain"
RECIPES = sorted(path.name.removesuffix(".yaml") for path in FOLDER.iterdir() if path.name.endswith(".yaml"))

# Steps on 24 images, on one processor: sizes shrink, the parts stay as the recipe has them.
SMALL = [
    "data.global_batch=8",
    "data.decode_size=null",
    "encoder.projector_hidden=16",
    "encoder.projector_dim=8",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "logging.progress=false",
]


def load(name, *overrides):
    return load_config(PretrainConfig, "pretrain", name, overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_classes(tmp_path_factory.mktemp("images"), 12, names=("a", "b"), size=(40, 40))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name in ("a", "b"):
        for number in range(12):
            tiny.write_images(root / name / str(number), 4, size=(20, 20), seed=number)
    return root


@pytest.mark.parametrize("videos", [100, 151, 1000, 100_000])
def test_the_recipe_for_videos_is_not_at_odds_with_itself_where_they_are_few(videos):
    assert overruled(load("clips").mining, videos) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_how_to_run_it_on_what_and_what_to_expect(name):
    header = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text())[0]
    command = "contrastive-pretrain\n" if name == "digits" else f"contrastive-pretrain --config {name}"
    for part in (command, "Hardware:", "Source:"):
        assert part in header
    assert re.search(r"Results?:|not yet measured", header)
    assert load(name).run.name == name or load(name).choose  # the folder's name


def test_queues_hold_as_many_keys_as_published():
    for name in ("cifar10", "cifar10_fast", "stl10"):
        config = load(name)
        assert config.bank.max_age * config.data.global_batch == 32_768  # MoCo v2+
    assert load("imagenet_resnet50").bank.capacity == 65_536  # MoCo v2


def test_the_published_negatives_of_moco_v3_are_the_keys_of_the_batch():
    config = load("imagenet_vit_small")
    keys = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
    miner = build_miner(
        config.bank, config.mining, rows=8, dim=4, seed=0, device=torch.device("cpu"), upcoming=None
    )
    miner.write(torch.nn.functional.normalize(torch.randn(4096, 4), dim=1), torch.arange(4096) % 8, 0)
    found = miner.negatives(keys, keys, torch.arange(4), 1)
    assert torch.equal(found.shared, keys)
    assert torch.equal(found.shared_log_weight == -torch.inf, torch.eye(4, dtype=torch.bool))
    assert found.hard_index.numel() == 0


@pytest.mark.parametrize("name", RECIPES)
def test_its_views_suit_its_loss_and_its_negatives(name):
    config = load(name)
    miner = build_miner(config.bank, config.mining, rows=8, dim=4, seed=0, device=torch.device("cpu"))
    check_views(config, miner, find_method(config), resumed=False)


def test_the_fast_recipe_stops_for_nothing_within_an_epoch():
    config = load("cifar10_fast")
    plan = Plan(50_000, 0, config.data.global_batch, config.schedule.epochs)
    assert plan.total_steps == 19_400
    assert config.run.checkpoint_every % plan.steps_per_epoch == 0
    assert config.logging.every_n_steps == plan.steps_per_epoch
    # Turn-over of the weights, the sum of rate x decay: that of the 1000 epochs it is taken from.
    long = load("cifar10")
    turnover = [
        each.optimizer.base_lr * each.optimizer.weight_decay * each.schedule.epochs for each in (config, long)
    ]
    assert turnover[0] == pytest.approx(turnover[1])


def small(name, folder, videos):
    """Return settings that make a recipe small, and the recipe."""
    config = load(name)
    given = ["data.name=imagefolder", f"data.root={folder}", "data.image_size=16", *SMALL]
    if config.mining.method == "ranked" and find_method(config).mines:
        given += ["mining.num_hard=2", "mining.num_uniform=2"]
    if config.data.frames > 1:
        given += ["data.name=clips", f"data.root={videos}", "data.frames=2", "data.fps=null"]
    if config.encoder.name == "torchvision:r3d_18":  # the small one of this shape
        given.append("encoder.name=r3d_10")
    if config.choose:
        given.append(f"schedule.epochs={config.schedule.epochs}")
    if config.schedule.minutes is not None:  # whose steps are measured, not known
        given.append("schedule.minutes=null")
    if config.encoder.name != "resnet50":  # which has one width
        given.append("encoder.width=8")
    if config.encoder.name.startswith("vit"):
        given.append("encoder.args.depth=1")
    if config.encoder.weights is not None:  # which would be downloaded
        given.append("encoder.weights=null")
    if config.encoder.batch_norm == "shuffle":  # which needs a second device
        given += ["encoder.batch_norm=split", "encoder.batch_norm_splits=2"]
    if config.bank.kind == "queue":
        given.append("bank.capacity=24")
    return given, config


# a plain one, choose=true, a queue, clips
@pytest.mark.parametrize("name", ["digits", "own", "imagenet_resnet50", "moving_digits"])
def test_a_dry_run_of_it(name, folder, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("contrastive.pretrain.STEPS", 2)
    given, config = small(name, folder, videos)
    assert main(["--config", name, "--dry-run", *given]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == config.schedule.epochs * (result["rows"] // 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_warned_of_in_its_first_epochs(name, folder, videos, tmp_path, capsys):
    given, config = small(name, folder, videos)
    if config.encoder.name == "resnet50":  # no warning is of its 24 million weights; the dry run has them
        given += ["encoder.name=resnet18", "encoder.width=8"]
    length = ["schedule.epochs=100", "schedule.warmup_epochs=1", "trainer.max_steps=12"]
    rarely = ["run.checkpoint_every=1000", "logging.mined_rows=0", "logging.wandb.mode=disabled"]
    rarely.append("logging.probe_every_epochs=0")  # 24 images are too few to be warned of a score
    assert main(["--config", name, *given, *length, *rarely, f"run.root={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"] == []

"""The recipe ``own`` end to end: chosen once, stated settings win, resumes and copies choose nothing anew."""

import json
import logging
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from contrastive.__main__ import main
from contrastive.choosing import choose as choosing
from contrastive.choosing.choose import choose_config
from contrastive.config import PretrainConfig
from contrastive.config_files import differences, load_saved
from contrastive.data.dataset import open_dataset
from contrastive.data.decode import read_file
from contrastive.encoders.weights import read_info
from contrastive.pretrain import pretrain
from eval.config import EvalConfig, EvalDataConfig
from eval.eval_data import choose_data
from tests import tiny
from tests.contrastive.pretrain.runs import same, weights

SMALL = [
    "encoder.width=8",
    "encoder.projector_hidden=16",
    "encoder.projector_dim=8",
    "schedule.epochs=3",
    "logging.mined_rows=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """A folder ``photos`` of three class folders, in the current one."""
    monkeypatch.chdir(tmp_path)
    return tiny.write_classes(tmp_path / "photos", 20, size=(20, 20))


@pytest.fixture
def own(capsys):
    """Call the command with ``--config own data.root=photos``; return exit code, last line and stderr."""

    def call(*arguments, config="own"):
        given = ["data.root=photos"] if config == "own" else []
        code = main(["--config", str(config), *given, *arguments])
        out, err = capsys.readouterr()
        return (
            code,
            json.loads(out.splitlines()[-1]) if out and "--print-config" not in arguments else out,
            err,
        )

    return call


@pytest.fixture
def blind(monkeypatch):
    """Fail if a folder or a machine is looked at."""

    def fail(*args, **kwargs):
        raise AssertionError("it was looked at")

    def close_eyes():
        monkeypatch.setattr(choosing, "look_at_folder", fail)
        monkeypatch.setattr(choosing, "look_at_machine", fail)

    return close_eyes


def test_a_folder_is_trained_on_and_each_choice_is_said_with_its_reason(own, tmp_path):
    code, result, err = own(*SMALL, "trainer.max_steps=2")
    assert (code, result["run"], result["steps"]) == (0, "runs/photos", 2)
    lines = err.splitlines()
    assert any(line.startswith("photos: ") and "shorter side 20 px" in line for line in lines)
    said = [line.strip() for line in lines if line.startswith("  ")]
    for start in ("run.name=photos: ", "data.name=imagefolder: ", "data.image_size=16: "):
        assert any(line.startswith(start) for line in said), start
    assert said.pop() == "the others, with reasons, rules and alternatives: --explain"
    assert lines[lines.index(f"  {said[-1]}") + 2].startswith("you decide: views differ in colour")
    saved = load_saved(PretrainConfig, tmp_path / "runs/photos/config.yaml")
    assert saved.choose is False
    assert (saved.data.name, saved.data.image_size, saved.method) == ("imagefolder", 16, "simclr")
    assert (saved.encoder.name, saved.encoder.width) == ("resnet10", 8)
    assert saved.data.mean != PretrainConfig().data.mean
    assert len(said) <= 7
    assert {*said} < {*saved.chosen}  # all reasons are kept
    assert any(line.startswith("data.mean=[") for line in saved.chosen)
    assert saved.chosen[0] == "run.name=photos: the name of the folder"


def test_a_short_run_trains_the_compact_network(own, tmp_path):
    given = [each for each in SMALL if not each.startswith(("encoder.width", "schedule."))]
    command = [*given, "schedule.minutes=1", "data.image_size=32", "trainer.max_steps=2"]
    code, result, err = own(*command)
    assert (code, result["steps"]) == (0, 2), err
    saved = load_saved(PretrainConfig, tmp_path / "runs/photos/config.yaml")
    assert (saved.encoder.name, saved.encoder.args["features"]) == ("cpu_resnet", 1024)
    assert (saved.augment.global_size, saved.augment.first_size) == (24, 16)
    assert "is not used" not in err
    code, result, err = own(*command[:-1], "trainer.max_steps=3")
    assert (code, result["steps"]) == (0, 3), err
    assert "continuing from step 2" in err


def test_what_is_stated_wins_in_a_file_and_on_the_command_line(own, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [own]\ndata: {root: photos, image_size: 24}\nrun: {name: other}\n"
    )
    code, out, err = own("--print-config", "mining=band", "data.mean=[0.1,0.2,0.3]", config="mine.yaml")
    assert code == 0
    for line in ("  image_size: 24", "  name: other", "  method: ranked", "  - 0.1", "choose: false"):
        assert line in out.splitlines()
    chosen = " ".join(yaml.safe_load(out)["chosen"])
    for key in ("data.image_size=", "run.name=", "mining.", "data.mean="):
        assert key not in chosen + err
    assert "data.std=" in chosen


def test_explain_adds_what_was_seen_and_the_rules(own):
    _, _, plain = own("--print-config")
    code, out, err = own("--print-config", "--explain", "schedule.minutes=60")  # long on one processor, too
    assert (code, "machine: " in plain, "machine: " in err) == (0, False, True)
    assert "continues from published weights" in err
    assert "continues from published weights" not in plain
    assert "choose: false" in out


def test_explain_stops_before_training_and_needs_choices(own, tmp_path):
    code, out, err = own("--explain", *SMALL)
    assert (code, out) == (0, "")
    assert "data.image_size=16: " in err
    assert "data.mean=[" in err
    assert not (tmp_path / "runs").exists()
    code, _, err = own("--explain", config="digits")
    assert code == 2
    assert "--config digits states all of its settings" in err


def test_the_same_command_resumes_without_looking_again(own, photos, blind, tmp_path):
    assert own(*SMALL, "run.name=whole")[0] == 0
    assert own(*SMALL, "trainer.max_steps=2", "run.checkpoint_every=1", "data.root=photos/")[0] == 0
    chosen = load_saved(PretrainConfig, tmp_path / "runs/photos/config.yaml").chosen
    blind()
    code, result, err = own(*SMALL, "run.checkpoint_every=1")
    assert (code, result["finished"]) == (0, True)
    assert "runs/photos: has begun; what was chosen then is kept" in err
    assert "continuing from step 2" in err
    assert not [line for line in err.splitlines() if line.startswith("  ")]
    _, _, err = own(*SMALL, "--explain")
    assert [line.strip() for line in err.splitlines() if line.startswith("  ")] == chosen
    assert same(weights(tmp_path / "runs/whole"), weights(tmp_path / "runs/photos"))
    before = (tmp_path / "runs/photos/encoder.safetensors").stat().st_mtime_ns
    code, again, err = own(*SMALL, "run.checkpoint_every=1")
    assert (code, again) == (0, result)
    assert "this run is finished" in err
    assert load_saved(PretrainConfig, tmp_path / "runs/photos/config.yaml").chosen == chosen != []
    assert (tmp_path / "runs/photos/encoder.safetensors").stat().st_mtime_ns == before


def test_another_setting_or_other_images_are_refused_as_ever(own, photos):
    assert own(*SMALL, "trainer.max_steps=2")[0] == 0
    code, _, err = own(*SMALL, "data.image_size=32")
    assert code == 2
    assert "holds a different run (data.image_size was 16, is 32)" in err
    tiny.write_images(photos / "red", 21)
    code, _, err = own(*SMALL)
    assert (code, "the data changed since this run began" in err) == (2, True)


def test_a_copy_of_the_config_is_the_same_run_and_chooses_nothing(own, blind, tmp_path):
    assert own(*SMALL)[0] == 0
    blind()
    shutil.copy(tmp_path / "runs/photos/config.yaml", tmp_path / "copy.yaml")
    code, _, err = own("run.name=copy", config="copy.yaml")
    assert code == 0
    assert "data.image_size" not in err
    configs = [
        load_saved(PretrainConfig, tmp_path / "runs" / name / "config.yaml") for name in ("photos", "copy")
    ]
    assert differences(*configs) == {"run.name": ("photos", "copy")}
    assert same(weights(tmp_path / "runs/photos"), weights(tmp_path / "runs/copy"))


def test_a_run_continues_from_the_encoder_of_another_by_its_file_alone(own, tmp_path):
    first = [*SMALL, "encoder.name=resnet18", "trainer.max_steps=1", "run.name=first"]
    assert own(*first)[0] == 0
    rest = [each for each in SMALL if not each.startswith("encoder.width")]
    given = "encoder.weights=runs/first/encoder.safetensors"
    code, _, err = own(*rest, given, "run.name=second", "trainer.max_steps=1")
    assert code == 0, err
    saved = load_saved(PretrainConfig, tmp_path / "runs/second/config.yaml")
    assert (saved.encoder.name, saved.encoder.width) == ("resnet18", 8)
    assert "encoder.name=resnet18 encoder.width=8 encoder.stem=small: the network of encoder.weights" in err


def test_a_dry_run_chooses_and_keeps_nothing(own, tmp_path, monkeypatch):
    monkeypatch.setattr("contrastive.pretrain.STEPS", 2)
    code, result, err = own(*SMALL, "--dry-run")
    assert (code, result["dry_run"]) == (0, True)
    assert "data.image_size=16: " in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["data.root=null"],
            "data.root is not set: settings are chosen for your images; add data.root=FOLDER",
        ),
        (["data.root=missing"], "missing: no such folder; set data.root to where the images are"),
        (["data.root=photos/red/0.png"], "is a file, a folder is needed"),
        (["data.name=digits"], "data.name=digits reads no folder; for your own images add data.name=images"),
        (["data.global_batch=0"], "data.global_batch=0: allowed is 2 or more"),
        (["data.image_size=large"], "data.image_size"),
        (["schedule.epochs=3", "schedule.warmup_epochs=5"], "schedule.warmup_epochs=5"),
        (["mining.query=stored", "mining.method=all_rows"], "mining.query=stored"),
    ],
)
def test_wrong_input_exits_with_2_and_the_remedy(own, tmp_path, arguments, words):
    code, _, err = own(*arguments)
    assert (code, words in err) == (2, True), err
    assert not (tmp_path / "runs").exists()


def test_too_few_images_exit_with_2(own, tmp_path):
    tiny.write_images(tmp_path / "few", 3)
    code, _, err = own("data.root=few")
    assert code == 2
    assert "error: data.root=few: 3 training images, at least 16 are needed" in err


def test_unreadable_files_are_tolerated(own, photos):
    for number in range(2):
        (photos / "red" / f"{number}.png").write_bytes(b"no image")
    code, _, err = own(*SMALL, "data.name=images", "data.max_corrupt=0.2", "trainer.max_steps=2")
    assert code == 0
    assert "2 of 60 cannot be read" in err
    assert (
        err.count("2 of the 60 training files cannot be read and are left out, see runs/photos/corrupt.csv")
        == 1
    )


def test_the_white_that_was_chosen_goes_with_the_encoder(own, photos, tmp_path):
    """Files of 16 bits whose values are of 12: run, encoder file and evaluation decode them alike."""
    for path in photos.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(16 * grey).save(path)
    code, _, err = own(*SMALL, "trainer.max_steps=2")
    assert code == 0
    assert "data.white=4095: the 16-bit images have values of 12 bits" in err
    assert "nearly black" not in err
    run = tmp_path / "runs/photos"
    assert load_saved(PretrainConfig, run / "config.yaml").data.white == 4095
    fed = read_info(run / "encoder.safetensors").input
    assert fed.white == 4095
    for given, white in ((EvalDataConfig(), 4095), (EvalDataConfig(white=8190), 8190)):
        data = choose_data(EvalConfig(str(run), data=given), run, fed)
        first = open_dataset(data).train
        assert read_file(first.path(0), fed.decode_size, white).equal(first.read(0))
        assert not read_file(first.path(0), fed.decode_size).equal(first.read(0))
    code, _, err = own(*SMALL, "data.white=65535", "trainer.max_steps=2")
    assert (code, "data.white was 4095, is 65535" in err) == (2, True)


def test_python_chooses_as_the_command_line_does(own, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("contrastive"), "propagate", True)
    config = choose_config(["data.root=photos", *SMALL, "trainer.max_steps=1"])
    code, summary = pretrain(config)
    assert (code, summary["run"]) == (0, "runs/photos")
    assert "data.image_size=16: " in caplog.text


def test_a_task_of_several_says_it_once(own, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "data.image_size" not in own("--print-config")[2]

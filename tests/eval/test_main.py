import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import eval.evaluate
import eval.report.write
from contrastive.config import PretrainConfig
from contrastive.config_files import load_config, load_saved
from contrastive.data.dataset import Dataset
from contrastive.data.files import open_tree
from contrastive.data.image_list import write_image_list
from contrastive.data.torch_dataset import DatasetImages
from contrastive.run_dir import write_run_files
from eval.__main__ import main
from eval.config import weak_view
from eval.evaluate import evaluate, headline, table
from eval.knn import KnnConfig, KnnEvaluation
from eval.protocol import find_protocol
from memory_bank import sealed
from tests import tiny
from tests.eval.conftest import add_pictures


def run_main(capsys, *arguments):
    code = main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny_folder(tmp_path):
    """Two classes of 3 training and 2 test images."""
    for seed, (part, count) in enumerate((("train", 3), ("val", 2))):
        tiny.write_classes(tmp_path / "tiny" / part, count, names=("dark", "light"), size=(16, 16), seed=seed)
    return tmp_path / "tiny"


def test_threads_wait_without_spinning_unless_the_user_says_otherwise(capsys, monkeypatch):
    import os

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run_main(capsys, "--help")[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run_main(capsys, "--help")[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        ("linear", ["top1", "top5"]),
        ("knn", ["top1 k=20", "top1 k=200"]),
        ("lowshot", ["top1 at 1 a class", "top1 at 100%"]),
        ("finetune", ["top1"]),
    ],
)
def test_a_protocol_from_end_to_end(protocol, names, shared_run, capsys):
    few = {
        "linear": ["linear.min_steps=20", "linear.learning_rates=[0.1]"],
        "lowshot": ["lowshot.labels_per_class=[1]", "lowshot.fractions=[1.0]", "seeds=2"],
        "finetune": ["finetune.epochs=1", "finetune.learning_rates=[1e-3]", "finetune.fraction=0.1"],
    }
    code, out, err = run_main(
        capsys, protocol, f"checkpoint={shared_run}", "device=cpu", *few.get(protocol, [])
    )
    assert code == 0
    short = json.loads(out.splitlines()[-1])
    result = json.loads((shared_run / "eval" / f"{protocol}.json").read_text())
    assert list(short["scores"]) == [row["name"] for row in result["scores"]] == names
    for row in result["scores"]:
        ours = row["encoder"]
        assert 0 <= ours["low"] <= ours["value"] <= ours["high"] <= 1
        for baseline in ("raw_pixels", "random_encoder"):
            assert row[baseline]["gain"]["value"] == pytest.approx(
                ours["value"] - row[baseline]["value"], abs=1e-6
            )
    assert result["settings"]["device"] == "cpu"
    assert ("knn" in result["settings"]) == (protocol == "knn")
    assert result["data"]["rows"] == {"train": 1335, "test": 462}
    assert len(result["encoder_sha256"]) == 64
    assert names[0] in err
    for baseline, told in (("encoder", "encoder"), ("random_encoder", "random encoder")):
        value = result["scores"][0][baseline]["value"]
        assert f"{told}: {names[0]} {100 * value:.1f}%, " in err  # as soon as it is known


def test_overall_numbers_make_sense(shared_run, capsys):
    """Raw pixels of the digits are known to give about 97% by kNN; a small random network less."""
    _, out, _ = run_main(capsys, "knn", f"checkpoint={shared_run}", "knn.k=[20]", "device=cpu")
    scores = json.loads(out.splitlines()[-1])["scores"]["top1 k=20"]
    assert scores["raw_pixels"] == pytest.approx(0.97, abs=0.015)
    assert 0.5 < scores["encoder"] < scores["raw_pixels"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["linaer", "checkpoint=RUN"], ["'linaer'", "did you mean 'linear'", "knn, lowshot"]),
        (["checkpoint=RUN"], ["no protocol given", "linear"]),
        (["linear"], ["checkpoint is not set", "checkpoint=runs/NAME"]),
        (["linear", "RUN"], ["key=value", "checkpoint="]),
        (["linear", "checkpoint=/nowhere"], ["/nowhere", "does not exist", "runs/NAME"]),
        (["linear", "checkpoint=RUN (alt)"], ["(alt): does not exist", "; the runs there are /"]),
        (["linear", "checkpoint=TMP"], ["holds no encoder.safetensors", "checkpoints/step-N"]),
        (
            ["linear", "checkpoint=RUN/config.yaml"],
            ["config.yaml", "not a .safetensors", "torchvision:MODEL:FILE"],
        ),
        (["linear", "checkpoint=RUN", "linear.heldout=0.2"], ["linear.heldout", "'linear.held_out'"]),
        (["linear", "checkpoint=RUN", "linear.held_out=2"], ["held_out=2", "below 1"]),
        (["linear", "checkpoint=RUN", "seeds=many"], ["seeds"]),
        (["knn", "checkpoint=RUN", "seeds=7"], ["unknown key 'seeds'", "allowed are checkpoint, data"]),
        (["stats", "checkpoint=RUN", "compare=[RUN]"], ["unknown key 'compare'"]),
        (["lowshot", "checkpoint=RUN", "view.flip=0"], ["unknown key 'view'"]),
        (["linear", "checkpoint=RUN", "view.flip=0"], ["unknown key 'view'"]),
        (["linear", "checkpoint=RUN", "knn.k=[5]"], ["knn.k=[5]", "setting of knn"]),
        (["knn", "checkpoint=RUN", "knn.k=[5000]"], ["knn.k=5000", "1335", "knn.k=[20]"]),
        (["knn", "checkpoint=RUN", "data.image_size=64"], ["64", "the encoder takes 16"]),
        (["knn", "checkpoint=RUN", "data.name=images", "data.root=TMP"], ["no labels", "imagefolder"]),
        (["knn", "checkpoint=RUN", "wandb.mode="], ["wandb=VALUE", "no keys below"]),
        (["knn", "checkpoint=RUN", "device=tpu9"], ["device=tpu9", "device=cpu"]),
        (["knn", "checkpoint=RUN", "device=meta"], ["device=meta", "device=cpu"]),
        (["linear", "checkpoint=RUN", "linear.weight_decays=[inf]"], ["weight_decays=[inf]", "3.4e+38"]),
        (["linear", "checkpoint=RUN", "linear.learning_rates=[nan]"], ["learning_rates=[nan]", "above 0"]),
        (["finetune", "checkpoint=RUN", "finetune.learning_rates=[1e300]"], ["=[1e+300]", "3.4e+38"]),
        (["finetune", "checkpoint=RUN", "finetune.weight_decay=1e300"], ["weight_decay=1e+300", "e+38"]),
        (["lowshot", "checkpoint=RUN", "lowshot.weight_decay=1e300"], ["weight_decay=1e+300", "e+38"]),
        (["linear", "checkpoint=RUN", "linear.protocol=cached"], ["contrastive-eval linear_sgd"]),
        (["knn", "checkpoint=RUN", "data.fps=-1"], ["data.fps=-1", "more than 0"]),
        (["knn", "checkpoint=RUN", "data.frame_step=0"], ["data.frame_step=0", "1 or more"]),
        (["knn", "checkpoint=RUN", "data.fps=5", "data.frame_step=2"], ["both set the distance"]),
        (["knn", "checkpoint=torchvision:resnet18:random", "data.image_size=5000"], ["8 to 4096"]),
        (["stats", "checkpoint=RUN", "finetune.epochs=3"], ["finetune.epochs=3", "setting of finetune"]),
        (["finetune", "checkpoint=RUN", "finetune.learning_rates=[1,0.1]"], ["ascending"]),
        (["finetune", "checkpoint=RUN", "finetune.batch_size=1"], ["batch_size=1", "2 or more"]),
        (["knn", "checkpoint=RUN", 'out="a\\0b"'], ["out='a\\x00b'", "no file's name"]),
        (["knn", "checkpoint=~nosuchuser/x"], ["checkpoint=~nosuchuser/x", "home folder"]),
        (["knn", "checkpoint=RUN", "out=~nosuchuser/x"], ["out=~nosuchuser/x", "home folder"]),
        (["finetune", "checkpoint=RUN", "data.name=images", "data.root=TMP"], ["no labels", "imagefolder"]),
        (["knn", "checkpoint=torchvision:resnet18:random"], ["its data is unknown", "data.name="]),
        (["knn", "checkpoint=torchvision:resnt:random", "data.name=digits"], ["did you mean resnet"]),
        (["report", "TMP/encoder.safetensors"], ["not inside a run directory", "runs/NAME"]),
    ],
)
def test_wrong_input(arguments, expected, shared_run, tmp_path, capsys):
    from PIL import Image

    if any("encoder.safetensors" in text for text in arguments):
        (tmp_path / "encoder.safetensors").write_bytes((shared_run / "encoder.safetensors").read_bytes())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given = [text.replace("RUN", str(shared_run)).replace("TMP", str(tmp_path)) for text in arguments]
    code, out, err = run_main(capsys, *given)
    assert code == 2
    assert out == ""
    assert err.rpartition("\r")[2].strip().startswith("error: ")  # after a progress bar, if one was shown
    assert "Traceback" not in err
    for text in expected:
        assert text.replace("RUN", str(shared_run)).replace("TMP", str(tmp_path)) in err


@pytest.mark.parametrize("protocol", ["knn", "stats", "report", "comparison"])
@pytest.mark.parametrize("out", ["FILE", "FILE/below", "/proc/x", "/dev/null"])
def test_results_that_cannot_be_written_are_refused_before_the_work(
    protocol, out, shared_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(eval.evaluate, "Extractor", None)  # the work
    monkeypatch.setattr(eval.report.write, "build", None)
    (tmp_path / "file").write_text("")
    given = [protocol, f"checkpoint={shared_run}", f"out={out.replace('FILE', str(tmp_path / 'file'))}"]
    if protocol == "comparison":
        given = ["report", str(shared_run), str(shared_run), given[-1]]
    code, stdout, err = run_main(capsys, *given)
    assert (code, stdout) == (2, "")
    assert "results cannot be written there (" in err
    assert "set out=FOLDER" in err


def test_a_run_that_takes_no_files_is_evaluated_elsewhere(new_run, tmp_path, capsys):
    """Without its cache, and without a word of damage where there is none."""
    run = new_run()
    (run / "eval").write_text("in the way")
    given = ["knn", f"checkpoint={run}", "knn.k=[5]", "device=cpu", "progress=false"]
    code, _, err = run_main(capsys, *given)
    assert (code, "results cannot be written there" in err) == (2, True)
    (tmp_path / "out" / "knn.json").mkdir(parents=True)
    code, _, err = run_main(capsys, *given, f"out={tmp_path / 'out'}")
    assert (code, "knn.json': results cannot be written there" in err) == (2, True)
    (tmp_path / "out" / "knn.json").rmdir()
    code, out, err = run_main(capsys, *given, f"out={tmp_path / 'out'}")
    assert (code, "damaged" in err) == (0, False)
    assert json.loads(out)["file"] == str(tmp_path / "out" / "knn.json")


def test_encoder_of_unknown_origin_needs_data(shared_run, tmp_path, capsys):
    lone = tmp_path / "encoder.safetensors"
    lone.write_bytes((shared_run / "encoder.safetensors").read_bytes())
    code, _, err = run_main(capsys, "knn", f"checkpoint={lone}")
    assert code == 2
    assert "data.name=" in err
    code, out, _ = run_main(
        capsys, "knn", f"checkpoint={lone}", "data.name=digits", "knn.k=[5]", "device=cpu"
    )
    assert code == 0
    assert json.loads(out)["file"] == str(tmp_path / "eval" / "knn.json")


def test_another_librarys_network_by_the_same_command(tmp_path, monkeypatch, capsys):
    """With random weights it is its own random baseline, so nothing is gained over that."""
    monkeypatch.chdir(tmp_path)
    given = ["checkpoint=torchvision:resnet18:random", "data.name=digits", "data.image_size=16"]
    code, out, _ = run_main(capsys, "knn", *given, "device=cpu", "knn.k=[5]")
    assert code == 0
    found = json.loads(out)
    assert found["file"] == str(tmp_path / "runs/torchvision-resnet18-random/eval/knn.json")
    scores = found["scores"]["top1 k=5"]
    assert scores["encoder"] == scores["random_encoder"] > 0.8
    result = json.loads((tmp_path / found["file"]).read_text())
    assert result["encoder"] == {"name": "torchvision:resnet18:random", "image_size": 16}


def test_one_class_few_rows_and_nan(new_run, tiny_folder, capsys):
    run = new_run(name="imagefolder", root=str(tiny_folder))
    few = [f"checkpoint={run}", "device=cpu"]
    code, _, err = run_main(capsys, "knn", *few)
    assert (code, "knn.k=20: the training part has 6" in err) == (2, True)
    code, out, err = run_main(capsys, "knn", *few, "knn.k=[200,5]")
    told = "knn.k=200: left out, the training part has 6 readable images"
    assert (code, json.loads(out)["warnings"], f"warning: {told}" in err) == (0, [told], True)
    assert list(json.loads(out)["scores"]) == ["top1 k=5"]
    (run / "eval" / "knn.json").unlink()
    code, _, err = run_main(capsys, "lowshot", *few)
    assert (code, "lowshot.labels_per_class=[1]" in err) == (2, True)

    tensors, meta = sealed.read(run / "encoder.safetensors")
    tensors["conv1.weight"][0] = torch.nan
    sealed.write(run / "encoder.safetensors", tensors, meta)
    code, _, err = run_main(capsys, "knn", *few, "knn.k=[1]")
    assert (code, "features of 6 of 6 train images are NaN" in err) == (2, True)
    assert not (run / "eval" / "knn.json").exists()

    for part in ("train", "val"):
        for file in (tiny_folder / part / "dark").iterdir():
            file.unlink()
        (tiny_folder / part / "dark").rmdir()
    code, _, err = run_main(capsys, "knn", *few, "knn.k=[1]")
    assert (code, "one class only (light)" in err) == (2, True)


def test_classes_and_what_lowers_the_worth_of_a_score_are_shown(new_run, tiny_folder, capsys):
    run = new_run(name="images", root=str(tiny_folder))
    write_image_list(run / "manifest.csv", open_tree(tiny_folder, 16))
    for file in (tiny_folder / "train" / "dark").iterdir():
        file.write_bytes(b"no image")
    next((tiny_folder / "val" / "light").iterdir()).write_bytes(b"")  # not scored, so not counted
    data = ["data.name=imagefolder", f"data.root={tiny_folder}"]
    code, out, err = run_main(capsys, "knn", f"checkpoint={run}", "device=cpu", "knn.k=[1]", *data)
    assert code == 0
    short = json.loads(out)
    assert (short["num_classes"], short["classes"]) == (2, ["dark", "light"])
    assert f"of {tiny_folder}, 2 classes (dark, light); test part" in err
    pretrained, untrained = short["warnings"]
    assert pretrained.startswith("3 of 3 test images were pretrained on")
    assert untrained.startswith("2 of 3 test images are of 1 class without a training image (dark), which")
    assert f"warning: {pretrained}\nwarning: {untrained}" in err
    result = json.loads(Path(short["file"]).read_text())
    assert result["warnings"] == [pretrained, untrained]
    assert result["pretrained"] == {"count": 3, "scored": 3}


def test_results_on_other_images_replace_none_of_the_runs_own(new_run, tiny_folder, tmp_path, capsys):
    run = new_run(name="images", root=str(tiny_folder))
    (tmp_path / "else").mkdir()
    other, namesake = tmp_path / "other", tmp_path / "else" / "other"
    shutil.copytree(tiny_folder, other)
    shutil.copytree(tiny_folder, namesake)
    given = [f"checkpoint={run}", "device=cpu", "progress=false", "data.name=imagefolder"]

    def evaluated(protocol, root, *more):
        code, out, _ = run_main(capsys, protocol, *given, f"data.root={root}", *more)
        assert code == 0
        return Path(json.loads(out)["file"])

    few = ["stats.rows=4"]
    (tmp_path / "link").symlink_to(tiny_folder)
    assert evaluated("stats", tmp_path / "link", *few, "data.name=images") == run / "eval" / "stats.json"
    by_class = evaluated("stats", tmp_path / "link", *few)
    assert re.fullmatch(
        rf"eval/on-{tiny_folder.name}-[0-9a-f]{{6}}/stats\.json", str(by_class.relative_to(run))
    )
    assert evaluated("stats", other, *few, f"out={tmp_path / 'out'}") == tmp_path / "out" / "stats.json"
    before = {file: file.read_bytes() for file in (run / "eval").iterdir() if file.is_file()}
    assert {file.name for file in before} == {"stats.json", "near_duplicates.csv"}
    files = [evaluated("stats", root, *few) for root in (other, namesake, f"{other}/../other")]
    assert {file: file.read_bytes() for file in before} == before
    assert files[0] == files[2] != files[1]
    for file in files:
        assert re.fullmatch(r"eval/on-other-[0-9a-f]{6}/stats\.json", str(file.relative_to(run)))
        assert file.with_name("near_duplicates.csv").is_file()
    assert evaluated("knn", other, "knn.k=[1]").parent == files[0].parent

    def scored_from_python(dark):
        pixels = [*torch.full((6, 3, 16, 16), dark, dtype=torch.uint8)]
        part = DatasetImages(pixels, 16, labels=[0, 1] * 3, classes=["a", "b"])
        config = KnnEvaluation(str(run), device="cpu", progress=False, knn=KnnConfig([1]))
        return evaluate("knn", config, dataset=Dataset(part, part, part))["file"]

    assert len({scored_from_python(dark) for dark in (0, 9, 9)}) == 2  # told apart by their content


def test_the_runs_own_images_are_those_where_it_began_and_those_of_its_manifest(
    new_run, tiny_folder, tmp_path, capsys, monkeypatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        shutil.copytree(tiny_folder, folder / "data")
    next((there / "data").rglob("*.png")).unlink()  # other images by the same relative name
    run = new_run(name="images", root="data")
    config = load_saved(PretrainConfig, run / "config.yaml")
    (run / "config.yaml").unlink()
    monkeypatch.chdir(here)
    write_run_files(run, config, open_tree(here / "data", 16))
    monkeypatch.chdir(there)

    def place(*data):
        few = ["device=cpu", "progress=false", "stats.rows=4", *data]
        code, out, err = run_main(capsys, "stats", f"checkpoint={run}", *few)
        assert code == 0, err
        return Path(json.loads(out)["file"]).parent.relative_to(run)

    assert place() == Path("eval")
    add_pictures(run)
    monkeypatch.chdir(tmp_path)  # where there is no folder of this name
    code, out, _ = run_main(capsys, "report", str(run))
    assert (code, json.loads(out)["missing"]) == (0, [])
    monkeypatch.chdir(there)
    assert place("data.name=imagefolder").name.startswith("on-data-")  # by class, so of other test images
    assert place("data.root=data").name.startswith("on-data-")
    (here / "data").rename(tmp_path / "moved")
    assert place(f"data.root={tmp_path / 'moved'}") == Path("eval")
    shutil.copytree(there / "data", tmp_path / "my data")
    assert place(f"data.root={tmp_path / 'my data'}").name.startswith("on-my-data-")


def test_many_classes_are_shown_in_short():
    data = {
        "name": "imagenet",
        "rows": {"train": 9},
        "rows_are": "images",
        "unreadable": {},
        "test_part": "none",
    }
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "gain": {"value": 0.0}}
    row = {
        "name": "top1",
        "interval": "Wilson, test images",
        "encoder": number,
        "raw_pixels": number,
        "random_encoder": number,
    }
    data |= {"classes": [f"n{number}" for number in range(1000)]}
    result = {"protocol": "knn", "scores": [row], "warnings": [], "data": data, "file": "knn.json"}
    assert "1000 classes (n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, ...)" in table(result)
    short = headline(result | {"seconds": {"total": 1}})
    assert (short["num_classes"], short["classes"][-1], len(short["classes"])) == (1000, "n9", 10)


def test_the_table_says_over_what_its_intervals_are(new_run, tiny_folder, capsys):
    run = new_run(name="images", root=str(tiny_folder))
    given = [f"checkpoint={run}", "device=cpu", "data.name=imagefolder", f"data.root={tiny_folder}"]
    code, _, err = run_main(capsys, "knn", *given, "knn.k=[1, 2]")
    assert (code, err.count("\n95% intervals: Wilson, test images\n")) == (0, 1)
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    kinds = (
        "over test images (Wilson) and 5 seeds (t)",
        "Wilson, test images",
        "Wilson, test images",
    )
    rows = [{"name": "top1", "interval": kind, "encoder": number} for kind in kinds]
    data = {
        "name": "digits",
        "rows": {"train": 9},
        "rows_are": "images",
        "unreadable": {},
        "test_part": "none",
        "classes": [],
    }
    result = {"protocol": "lowshot", "scores": rows, "warnings": [], "data": data, "file": "lowshot.json"}
    assert table(result).splitlines()[4] == f"95% intervals: {kinds[0]}; {kinds[1]}"


@pytest.mark.parametrize("out", [None, "out/deep"])
def test_a_failed_evaluation_leaves_no_folder(new_run, tiny_folder, tmp_path, capsys, out):
    run = new_run(name="images", root=str(tiny_folder))
    before = sorted(tmp_path.rglob("*"))
    given = [] if out is None else [f"out={tmp_path / out}"]
    assert run_main(capsys, "knn", f"checkpoint={run}", "device=cpu", *given)[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_our_own_fault_shows_a_traceback(shared_run, monkeypatch, capsys):
    def broken(protocol, config):
        raise KeyError("ours")

    monkeypatch.setattr(eval.evaluate, "evaluate", broken)
    with pytest.raises(KeyError):  # the interpreter prints it and exits with 1
        run_main(capsys, "knn", f"checkpoint={shared_run}")


def test_an_interrupt_is_no_fault_of_ours(shared_run, monkeypatch, capsys):
    def interrupted(protocol, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval.evaluate, "evaluate", interrupted)
    code, out, err = run_main(capsys, "knn", f"checkpoint={shared_run}")
    assert (code, out) == (130, "")
    assert err.startswith("interrupted; ")


def test_nothing_given_is_wrong_input_and_shows_the_help(capsys):
    code, out, err = run_main(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: contrastive-eval PROTOCOL")
    assert err.splitlines()[-1].startswith("error: no protocol given; ")


def test_help_of_a_protocol_shows_its_settings(capsys):
    code, out, _ = run_main(capsys, "knn", "--help")
    assert code == 0
    assert out.startswith("usage: contrastive-eval")
    assert "Settings of knn:" in out
    assert out.endswith("knn:\n  k: [20, 200]\n  temperature: 0.07\n")


@pytest.mark.parametrize(
    "protocol",
    [
        "worth",
        "linear",
        "linear_sgd",
        "knn",
        "lowshot",
        "finetune",
        "stats",
        "neighbours",
        "report",
    ],
)
def test_shipped_yaml_states_the_defaults(protocol):
    settings = find_protocol(protocol).config
    loaded = load_config(settings, "eval", protocol, ["checkpoint=x"])
    draws = {"seeds": 5} if protocol in ("worth", "lowshot") else {}
    assert loaded == settings(checkpoint="x", **draws)


def test_the_default_view_is_the_weak_preset():
    assert load_config(PretrainConfig, "pretrain", "cifar10", ["augment=weak"]).augment.view_1 == weak_view()


@pytest.mark.parametrize(("name", "value", "least"), [("WORLD_SIZE", "two", 1), ("RANK", "-1", 0)])
def test_a_launchers_variable_that_is_no_number_is_named(shared_run, capsys, monkeypatch, name, value, least):
    monkeypatch.setenv(name, value)
    code, out, err = run_main(capsys, "knn", f"checkpoint={shared_run}", "progress=false")
    assert (code, out) == (2, "")
    assert err == (
        f"error: the environment has {name}={value!r}: a whole number, {least} or more, is needed; "
        "correct it, or unset it\n"
    )

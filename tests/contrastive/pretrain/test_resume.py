"""Runs that continue: to the bit, and only where they are the same run."""

import re
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from contrastive import parts
from contrastive.logging.metrics_csv import MetricsCsv
from contrastive.run_dir import lock_run_dir
from tests import tiny
from tests.contrastive.pretrain.runs import bank, metrics, same, table, weights
from tests.forked import forkserver


def test_a_finished_run_is_not_repeated(run, tmp_path):
    _, first, _ = run()
    before = (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns
    code, second, _ = run()
    assert (code, second) == (0, first)
    assert (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns == before


NEIGHBOURS = ["method=simclr", "data.order=neighbours", "data.neighbours.group=4", "data.neighbours.width=5"]


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ([*tiny.MONITORED], 5),
        (["method=sogclr"], 5),
        (NEIGHBOURS, 5),
        ([*NEIGHBOURS, "data.neighbours.kind=random_walk", "data.resident=false", "data.num_workers=1"], 4),
        (["data.crop=original", "data.num_workers=0", "augment.first_size=12", "augment.num_local=1"], 5),
    ],
    ids=["moco", "sogclr", "greedy", "walk at the end of an epoch", "crops of the original"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(run, tmp_path, settings, step):
    run("run.name=whole", *settings)
    whole = tmp_path / "runs" / "whole"
    run("run.name=parts", f"trainer.max_steps={step}", "run.checkpoint_every=2", *settings)
    parts = tmp_path / "runs" / "parts"
    code, _, err = run("run.name=parts", "run.checkpoint_every=2", *settings)
    assert code == 0
    assert f"parts: continuing from step {step} of 12" in err
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))
    losses = [[(row["step"], row["train/loss"]) for row in metrics(path)] for path in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12 + ("knn/top1" in metrics(whole)[0])  # which is scored at step 0 too


def test_a_run_keeps_what_its_views_are_cut_from(run, tmp_path, monkeypatch):
    """Runs of before ``data.crop`` have squares; new ones that decode in every epoch have the original."""
    saved, seen = tmp_path / "runs/tiny/config.yaml", []
    draw = parts.draw_crops
    monkeypatch.setattr(
        parts, "draw_crops", lambda images, data, *how: seen.append(data.crop) or draw(images, data, *how)
    )
    given = ["data.image_size=72", "augment.global_size=32", "data.resident=false", "data.num_workers=0"]
    assert run(*given, "data.crop=square", "trainer.max_steps=1")[0] == 0
    saved.write_text(saved.read_text().replace("  crop: square\n", ""))
    assert run(*given, "trainer.max_steps=2")[0] == 0
    code, _, err = run(*given, "data.crop=original")
    assert (code, "data.crop was 'square', is 'original'" in err) == (2, True)
    assert run(*given, "run.name=new", "trainer.max_steps=1")[0] == 0
    assert "  crop: original\n" in (tmp_path / "runs/new/config.yaml").read_text()
    assert seen == ["square", "square", "original"]


@pytest.mark.parametrize("recipe", [[], ["--config", "runs/tiny/config.yaml"]])
def test_a_run_of_before_that_named_its_method_by_the_loss_goes_on(run, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    assert run("method=simclr", "trainer.max_steps=2")[0] == 0
    saved = tmp_path / "runs/tiny/config.yaml"
    text = saved.read_text().replace("name: info_nce", "name: nt_xent")
    saved.write_text(text.replace("method: simclr\n", "method: auto\n"))
    code, _, err = run(*(recipe or ["method=simclr"]), "trainer.max_steps=3")
    assert (code, "continuing from step 2 of" in err) == (0, True)


def test_a_bank_that_only_monitors_read_is_a_sample_of_many_rows(run, tmp_path, monkeypatch):
    """Runs of before have a slot for each row, and keep them; a bank that is read or stated has them, too."""

    def slots(name, *given):
        assert run(f"run.name={name}", "logging.mined_rows=2", *given)[0] == 0
        return bank(tmp_path / "runs" / name)["id"].tolist()

    begun = ["method=simclr", "trainer.max_steps=4"]
    assert len(slots("before", *begun)) == 38
    monkeypatch.setattr(parts, "SHOWN_ROWS", 20)
    assert len(slots("before", "method=simclr")) == 38
    assert len(slots("halves", *begun)) == 20
    assert slots("halves", "method=simclr") == slots("whole", "method=simclr")
    assert all((tmp_path / "runs/whole" / name).is_file() for name in ("bank.png", "mined.csv"))
    every = [["method=moco"], ["method=nnclr"], NEIGHBOURS, ["method=simclr", "bank.kind=dataset"]]
    for number, settings in enumerate(every):
        assert len(slots(f"every{number}", "trainer.max_steps=1", *settings)) == 38
    assert len(slots("batch", "trainer.max_steps=1", "mining.method=in_batch")) == 20


def test_a_resumed_run_does_not_read_the_starting_weights(run, tmp_path):
    file = tmp_path / "start.safetensors"
    run("run.name=first", "trainer.max_steps=1")
    (tmp_path / "runs/first/encoder.safetensors").rename(file)
    given = [f"encoder.weights={file}", "run.checkpoint_every=2"]
    assert run("run.name=whole", *given, "trainer.max_steps=6")[0] == 0
    assert run(*given, "trainer.max_steps=4")[0] == 0
    file.unlink()
    code, _, err = run(*given, "--dry-run")
    assert (code, "cannot be read" in err) == (2, True)  # a dry run starts from the file
    code, result, _ = run(*given, "trainer.max_steps=6")
    assert (code, result["steps"]) == (0, 6)
    assert same(weights(tmp_path / "runs/tiny"), weights(tmp_path / "runs/whole"))


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MetricsCsv, "state_dict", lambda self: {"seconds": 1000.0})  # spent by a first part
        run("trainer.max_steps=11", "run.checkpoint_every=1")
    _, result, _ = run()
    assert result["steps"] == 12
    assert 1000 < result["metrics"]["seconds"] <= result["seconds"] + 0.05 < 1100


def test_a_kill_between_the_last_save_and_its_pointer_is_mended(run, tmp_path):
    run()
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    newest = (checkpoints / "last").read_text()
    older = next(path.name for path in checkpoints.glob("step-*") if path.name != newest.strip())
    (checkpoints / "last").write_text(older + "\n")
    (tmp_path / "runs/tiny/summary.json").unlink()
    code, _, _ = run()
    assert code == 0
    assert (checkpoints / "last").read_text() == newest


def test_a_second_process_is_refused_by_name(run, tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    reader, writer = forkserver().Pipe(duplex=False)
    holder = forkserver().Process(target=hold, args=(run_dir, writer))
    holder.start()
    assert reader.poll(timeout=120)
    code, _, err = run()
    holder.kill()
    holder.join()
    assert code == 2
    for part in (f"process {holder.pid}", "run.name"):
        assert part in err
    assert not (run_dir / "config.yaml").exists()
    assert run()[0] == 0  # a killed holder's lock is gone with it


def hold(run_dir, writer):
    lock = lock_run_dir(run_dir)
    writer.send("held")
    time.sleep(120)
    del lock


def test_damaged_files_of_a_run_are_named_or_done_without(run, tmp_path):
    run("trainer.max_steps=4", "run.checkpoint_every=2")
    run_dir = tmp_path / "runs" / "tiny"
    (run_dir / "summary.json").write_text('{"steps": ')
    assert run("trainer.max_steps=4", "run.checkpoint_every=2")[0] == 0
    manifest = (run_dir / "manifest.csv").read_bytes()
    (run_dir / "manifest.csv").unlink()
    code, _, err = run("run.checkpoint_every=2")
    assert code == 2
    assert "manifest.csv is missing" in err
    (run_dir / "manifest.csv").write_bytes(manifest)
    for file in (run_dir / "checkpoints").glob("step-*/trainer.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint skipped"):
        code, _, err = run("run.checkpoint_every=2")
    assert code == 2
    assert "none of its checkpoints can be read" in err


def test_unreadable_files_are_listed_anew_where_the_data_changed(run, folder, tmp_path):
    listed = tmp_path / "runs/tiny/corrupt.csv"
    for number in range(3):
        (folder / "red" / f"broken-{number}.png").write_bytes(b"no image")
    assert run("data.max_corrupt=0.01")[0] == 3
    (folder / "red" / "broken-0.png").unlink()
    assert run("data.max_corrupt=0.5", "trainer.max_steps=2", "run.checkpoint_every=1")[0] == 0
    if listed.exists():  # two steps do not meet every file
        assert {Path(row["key"]).name for row in table(listed)} <= {"broken-1.png", "broken-2.png"}
    (folder / "red" / "broken-1.png").unlink()
    (folder / "red" / "a.png").write_bytes(b"no image")
    assert run("data.max_corrupt=0.5", "data.allow_changed=true")[0] == 0
    assert {Path(row["key"]).name for row in table(listed)} == {"a.png", "broken-2.png"}


def test_another_runs_directory_names_the_fields_that_differ(run):
    run()
    code, _, err = run("optimizer.base_lr=0.5", "objective.temperature=0.3")
    assert code == 2
    for part in ("optimizer.base_lr was", "is 0.5", "objective.temperature", "run.name"):
        assert part in err


def test_changed_data_behind_a_run_names_the_files(run, folder, tmp_path):
    run("trainer.max_steps=2", "run.checkpoint_every=1")
    victim = sorted((folder / "red").iterdir())[0]
    victim.write_bytes(victim.read_bytes() + b"more")
    code, _, err = run("run.checkpoint_every=1")
    assert code == 2
    assert victim.name in err
    assert "data.allow_changed=true" in err
    assert run("run.checkpoint_every=1", "data.allow_changed=true")[0] == 0


@pytest.mark.parametrize(
    "bank",
    [[], ["bank.kind=queue", "bank.capacity=20"], ["method=sogclr"], NEIGHBOURS],
    ids=["dataset", "queue", "sogclr", "neighbours"],
)
def test_files_added_or_removed_are_gone_on_with_without_the_old_bank(run, folder, tmp_path, bank):
    """From then on they are the run's: it resumes without the flag."""
    every = ["run.checkpoint_every=1", *bank]
    run("trainer.max_steps=4", *every)
    sorted((folder / "red").iterdir())[0].unlink()
    for number in range(6):
        Image.new("RGB", (20, 20), (number * 40, 90, 0)).save(folder / "blue" / f"more-{number}.png")
    code, _, err = run(*every)
    assert code == 2
    assert "added" in err
    code, _, err = run("trainer.max_steps=6", "data.allow_changed=true", *every)
    assert code == 0
    assert "starts empty" in err
    code, result, err = run(*every)
    assert code == 0
    assert result["finished"]
    assert "starts empty" not in err
    for path in sorted((folder / "green").iterdir())[:-2]:
        path.unlink()
    (tmp_path / "runs/tiny/summary.json").unlink()
    code, _, err = run("data.allow_changed=true", *every)
    assert code == 2
    assert "restore the data" in err


def test_odd_entries_of_a_run_are_refused_by_name_before_a_step_is_taken(run, tmp_path):
    run = partial(run, *tiny.MONITORED)  # mined.csv and views.png too
    run("trainer.max_steps=2")
    run_dir = tmp_path / "runs" / "tiny"
    for name in (
        "metrics.csv",
        "encoder.safetensors",
        "mined.csv",
        "bank.png",
        "corrupt.csv",
        "checkpoints/last",
    ):
        path, kept = run_dir / name, tmp_path / "kept"
        if path.exists():
            path.rename(kept)
        path.mkdir()
        code, _, err = run()
        assert (code, f"{path}: the run writes this file" in err) == (2, True), err
        path.rmdir()
        if kept.exists():
            kept.rename(path)
    (run_dir / "views.png").unlink()
    (run_dir / "views.png").symlink_to(tmp_path / "nowhere" / "views.png")
    assert "views.png: the run writes this file" in run()[2]
    (run_dir / "views.png").unlink()
    (run_dir / "checkpoints").rename(tmp_path / "moved")
    (run_dir / "checkpoints").write_text("")
    code, _, err = run()
    assert (code, "checkpoints: the folder of checkpoints cannot be read" in err) == (2, True), err
    (run_dir / "checkpoints").unlink()
    (tmp_path / "moved").rename(run_dir / "checkpoints")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"(?m)^trainer:\n(  .*\n)+", "trainer: [1]\n", text))
    code, _, err = run()
    assert (code, "config.yaml: Cannot merge" in err) == (2, True), err
    (run_dir / "config.yaml").write_text(text)
    assert run("trainer.max_steps=3")[0] == 0


@pytest.mark.parametrize("kept", ["data.cache=kept", "data.resident=true"])
def test_a_run_whose_views_are_cut_from_whole_pictures_keeps_no_squares(run, kept):
    large = ["data.image_size=72", "augment.global_size=16"]
    assert run(*large, "data.resident=false", "trainer.max_steps=1")[0] == 0
    code, _, err = run(*large, kept, "trainer.max_steps=2")
    assert code == 2
    assert "cuts its views from whole pictures" in err

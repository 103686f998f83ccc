"""A pre-empted, resumed and evaluated run on W&B, read back by W&B's own reader."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest

from contrastive.__main__ import main
from contrastive.callbacks.metrics import LogMetrics
from contrastive.callbacks.watch_ranks import WatchRanks
from contrastive.logging.names import GROUPS, MEDIA, describe
from eval.__main__ import main as evaluate
from tests import tiny
from tests.contrastive.logging.harness import read_records


@pytest.fixture
def photos(tmp_path):
    """60 images in three classes, told apart by colour, one of them unreadable."""
    photos = tiny.write_classes(tmp_path / "photos", 20, size=(16, 16))
    (photos / "red" / "torn.png").write_bytes(b"no image")
    return photos


@pytest.fixture
def command(photos, tmp_path, capsys, monkeypatch):
    """Call the command offline with a tiny recipe; returns exit code and stderr."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # set for the whole process when a run starts
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    small = (
        "data.image_size=16 data.global_batch=8 data.num_workers=0 encoder.width=8 encoder.projector_dim=8"
    )
    short = "schedule.epochs=3 schedule.warmup_epochs=1 logging.every_n_steps=2 logging.knn_every_epochs=1"
    mining = "mining.num_hard=4 mining.num_uniform=4 mining.min_fill=0.2 logging.mined_rows=3"
    pictures = "logging.attention_every_epochs=2 logging.progress=false"
    fixed = f"{small} {short} {mining} {pictures} trainer.accelerator=cpu run.checkpoint_every=5"

    def call(*overrides):
        data = ["data.name=imagefolder", f"data.root={photos}"]
        code = main([*fixed.split(), *data, f"run.root={tmp_path / 'runs'}", "run.name=tiny", *overrides])
        return code, capsys.readouterr().err

    return call


def offline_runs(run_dir):
    """Records by type of every offline run, the oldest first."""
    paths = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    return [read_records(path) for path in paths]


def history(records):
    return [record["item"] for record in records["history"]]


def media(records):
    """Optimizer steps at which each picture or table was sent."""
    found: dict[str, list[int]] = {}
    for row in history(records):
        for name in [name.removesuffix("._type") for name in row if name.endswith("._type")]:
            found.setdefault(name, []).append(row["trainer/global_step"])
    return found


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def folder(key):
    return Path(key).parent


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_a_preempted_resumed_and_evaluated_run_read_back(command, tmp_path, monkeypatch, capsys):
    on_step, stop_at = LogMetrics.on_step, 7

    def stop(self, trainer, module, step):
        on_step(self, trainer, module, step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LogMetrics, "on_step", stop)
    assert command("logging.wandb.mode=offline")[0] == 75
    stop_at = 0
    assert command("logging.wandb.mode=offline")[0] == 0
    run_dir = tmp_path / "runs" / "tiny"
    probe = ["linear", f"checkpoint={run_dir}", "device=cpu", "linear.min_steps=5", "linear.epochs=1"]
    capsys.readouterr()
    assert evaluate([*probe, "wandb=offline"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    folder_of_third = max((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert told == [f"W&B: offline run, to upload it: wandb sync {folder_of_third}"]  # not 35 of W&B's

    first, second, third = offline_runs(run_dir)
    started = [records["run"][0] for records in (first, second, third)]
    # One W&B run over the pre-emption; the evaluation is another one of its group.
    wandb_id = started[0]["run_id"]
    assert started[1]["run_id"] == wandb_id != started[2]["run_id"]
    assert [run["run_group"] for run in started] == [wandb_id] * 3
    assert [run["job_type"] for run in started] == ["pretrain", "pretrain", "linear"]
    assert [run["display_name"] for run in started] == ["tiny", "tiny", "tiny linear"]
    assert [records["exit"][0].get("exit_code", 0) for records in (first, second, third)] == [75, 0, 0]
    assert [alert["title"] for alert in first["alert"]] == ["preemption"]
    assert "SIGTERM" in first["alert"][0]["text"]
    assert "preempting" in first
    assert not {"alert", "preempting"} & second.keys()

    # Every metric of metrics.csv, with its values and at its steps, under documented names.
    table = read(run_dir / "metrics.csv")
    sent: dict[int, dict[str, float]] = {}
    for row in history(first) + history(second):
        sent.setdefault(row["trainer/global_step"], {}).update(row)
    assert {int(row["step"]) for row in table} == sent.keys()
    names = table[0].keys() - {"step", "seconds", "epoch"}
    for row in table:
        for name in names:
            if row[name] not in ("", "nan"):
                assert sent[int(row["step"])][name] == pytest.approx(float(row[name])), name
    assert {name for name in names if describe(name) is None} == set()
    assert {name.partition("/")[0] for name in names} == GROUPS.keys()
    assert float(table[-1]["data/unreadable"]) == len(read(run_dir / "corrupt.csv")) == 1

    # Pictures: the views at the start, gallery and map at the end of each epoch, the table at the very end.
    assert media(first) == {"views/grid": [0], "mining/gallery": [5], "bank/map": [5]}
    drawn = {"mining/gallery": [10, 15], "bank/map": [10, 15], "mining/hardest": [15]}
    assert media(second) == drawn | {"views/attention": [10]}
    assert {*media(first), *media(second)} | {"probe/confusion", "knn/confusion"} == MEDIA.keys()
    last = next(row for row in history(second) if "mining/hardest._type" in row)
    mined = read(run_dir / "mined.csv")
    assert (last["mining/gallery.count"], last["mining/hardest.nrows"]) == (3, len(mined))
    caption = last["mining/gallery.captions"][0].splitlines()
    assert caption[0] == mined[0]["anchor_key"]
    same = " (same label)" if folder(mined[0]["anchor_key"]) == folder(mined[0]["negative_key"]) else ""
    assert caption[1] == f"{mined[0]['similarity']} {mined[0]['negative_key']}{same}"
    pictures = {path.name for path in (run_dir / "wandb").rglob("media/**/*.png")}
    for path in (last["bank/map.path"], *last["mining/gallery.filenames"]):
        assert Path(path).name in pictures

    # Config with provenance; the encoder goes out of one run and into the other, with the same content.
    config = started[1]["config"]["update"]
    assert config["objective"]["temperature"] == 0.2
    assert config["provenance"]["wandb_id"] == wandb_id
    made, used = (
        [item for item in records["artifact"] if item["type"] == "model"] for records in (second, third)
    )
    assert [item["name"] for item in made + used] == [f"encoder-{wandb_id}"] * 2
    assert made[0]["digest"] == used[0]["digest"]
    assert not made[0].get("use_after_commit")
    assert used[0]["use_after_commit"]

    (scores,) = history(third)
    rows = json.loads((run_dir / "eval" / "linear.json").read_text())["scores"]
    assert scores["probe/top1"] == pytest.approx(rows[0]["encoder"]["value"])
    assert scores["probe/top1_raw_pixels"] == pytest.approx(rows[0]["raw_pixels"]["value"])
    assert scores["probe/confusion._type"] == "image-file"
    assert scores["trainer/global_step"] == 15
    assert {item.get("step_metric") for item in third["metric"]} >= {"trainer/global_step"}
    assert started[2]["config"]["update"]["eval"]["settings"]["linear"]["min_steps"] == 5


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_a_run_that_was_killed_has_each_value_once(command, tmp_path, monkeypatch):
    def killed(self, trainer, *_):
        if trainer.global_step == 8:
            raise KeyError("killed")

    given = ["logging.wandb.mode=offline", "logging.every_n_steps=1", "logging.probe_every_epochs=0"]
    with monkeypatch.context() as patch:
        patch.setattr(WatchRanks, "on_train_batch_end", killed)
        with pytest.raises(KeyError, match="killed"):
            command(*given)
    import wandb

    wandb.finish(1)
    assert command(*given)[0] == 0
    first, second = offline_runs(tmp_path / "runs" / "tiny")
    assert first["run"][0]["run_id"] == second["run"][0]["run_id"]
    found = [
        (row["trainer/global_step"], name)
        for row in history(first) + history(second)
        for name in row
        if name.partition("/")[0] in ("train", "perf", "mining", "stats")
    ]
    assert len(found) == len(set(found))
    assert {step for step, name in found if name == "train/loss"} == set(range(1, 16))

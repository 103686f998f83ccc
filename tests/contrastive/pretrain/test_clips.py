"""Runs on clips, by the command line: resume, pictures, unreadable videos, evaluation, report, export."""

import json

import numpy as np
import pytest
from PIL import Image

from contrastive.choosing.choose import choose_config
from contrastive.config import UserError
from contrastive.export.__main__ import main as export
from eval.__main__ import main as evaluate
from tests.contrastive.pretrain.runs import bank, same, table, weights
from tests.tiny import write_images, write_video

SETTINGS = [
    "data.name=clips",
    "data.frames=4",
    "data.clips_per_video=2",
    "encoder.temporal=attention",
    "encoder.temporal_args={dim: 16, layers: 1, heads: 2}",
    "logging.knn_every_epochs=3",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Folders of frames: a square moves to the right or to the left."""
    root = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 6)):
        for name, sign in (("left", -1), ("right", 1)):
            for number in range(count):
                folder = root / part / name / str(number)
                folder.mkdir(parents=True)
                start = noise.integers(16)
                for frame in range(8):
                    pixels = np.full((16, 16, 3), 30, np.uint8)
                    pixels[5:11, (np.arange(6) + start + sign * 2 * frame) % 16] = noise.integers(150, 255)
                    Image.fromarray(pixels).save(folder / f"{frame}.png")
    return root


@pytest.fixture
def clips(run, videos):
    """Call the command on the videos."""
    return lambda *overrides: run(*SETTINGS, f"data.root={videos}", *overrides)


@pytest.mark.parametrize(
    "first", [[], ["data.resident=false", "data.num_workers=1"]], ids=["resident", "workers"]
)
def test_a_resumed_run_equals_an_uninterrupted_one_wherever_frames_come_from(clips, tmp_path, first):
    code, result, _ = clips("run.name=whole")
    assert (code, result["steps"]) == (0, 6)
    assert 0 <= result["metrics"]["knn/top1"] <= 1
    assert clips("run.name=parts", "trainer.max_steps=4", "run.checkpoint_every=2", *first)[0] == 0
    code, _, err = clips("run.name=parts", "run.checkpoint_every=2")
    assert (code, "parts: continuing from step 4 of 6" in err) == (0, True)
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))


def test_a_run_is_drawn_measured_and_exported(clips, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "tiny"
    assert clips("logging.mined_rows=3")[0] == 0
    with Image.open(run_dir / "views.png") as picture:
        assert picture.size == (4 * 18 + 2, 9 * 18 + 2)  # 3 clips, each above its 2 views
    assert table(run_dir / "mined.csv")[0]["anchor_key"].startswith("train/")
    common = [f"checkpoint={run_dir}", "progress=false", "device=cpu"]
    protocols = ("knn", ["knn.k=[3]"]), ("finetune", FINETUNE), ("stats", []), ("neighbours", [])
    for protocol, more in protocols:
        assert evaluate([protocol, *common, *more]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        if protocol != "stats":
            compared = [*next(iter(result["scores"].values()))]
            assert compared == ["encoder", "raw_pixels", "random_encoder", "single_frame", "shuffled_frames"]
    assert evaluate(["report", *common]) == 0
    page = (run_dir / "report.html").read_text()
    assert "a clip of a video, then the two random views" in page
    assert page.count('<figure title="train/') > 3
    out = tmp_path / "features.npz"
    assert (
        export([f"checkpoint={run_dir}", "format=embeddings", f"out={out}", "progress=false", "device=cpu"])
        == 0
    )
    with np.load(out) as saved:
        assert saved["embedding"].shape == (20, 16)
        assert saved["path"][0] == "train/left/0"
    card = out.with_name("features.npz.md").read_text()
    assert "16 numbers a clip" in card
    assert "4 frames, RGB, 16 x 16 px" in card
    assert "every frame_step = 1 frames" in card


FINETUNE = [
    "finetune.learning_rates=[0.01]",
    "finetune.epochs=1",
    "finetune.batch_size=8",
    "finetune.held_out=0.3",
]


MOMENTS = ["data.name=clips", "logging.knn_every_epochs=3", "logging.probe_every_epochs=0"]


@pytest.mark.parametrize(
    "kept",
    [[], ["data.resident=false", "data.num_workers=1"], ["data.cache=cache", "data.resident=false"]],
    ids=["resident", "workers", "cache"],
)
def test_two_moments_train_an_encoder_of_images_that_resumes_to_the_bit(
    run, videos, tmp_path, monkeypatch, kept
):
    monkeypatch.chdir(tmp_path)
    moments = [*MOMENTS, f"data.root={videos}"]
    code, result, err = run(*moments, "run.name=whole", "data.resident=false", "data.num_workers=0")
    assert (code, result["steps"]) == (0, 6)
    assert "each view is one frame of a video" in err
    assert run(*moments, "run.name=parts", "trainer.max_steps=4", "run.checkpoint_every=2", *kept)[0] == 0
    assert run(*moments, "run.name=parts", "run.checkpoint_every=2")[0] == 0
    assert run(*moments, "run.name=still", "augment.time.max_gap=0")[0] == 0
    whole, parts, still = (tmp_path / "runs" / name for name in ("whole", "parts", "still"))
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))
    assert not same(weights(whole), weights(still))


def test_two_moments_are_drawn_and_measured_on_videos_and_on_pictures(run, videos, folder, tmp_path, capsys):
    run_dir, moments = tmp_path / "runs" / "tiny", [*MOMENTS, f"data.root={videos}"]
    code, result, _ = run("--dry-run", *moments)
    assert (code, result["parameters"] > 0) == (0, True)
    assert run(*moments, "logging.mined_rows=3")[0] == 0
    with Image.open(run_dir / "views.png") as picture:
        assert picture.size == (3 * 18 + 2, 3 * 18 + 2)  # 3 middle frames above their 2 views
    assert table(run_dir / "mined.csv")[0]["anchor_key"].startswith("train/")
    common = [f"checkpoint={run_dir}", "progress=false", "device=cpu"]
    pictures = ["data.name=imagefolder", f"data.root={folder}"]
    protocols = ("knn", ["knn.k=[3]"]), ("finetune", FINETUNE), ("stats", []), ("retrieval", [])
    for data in ([], pictures):
        for protocol, more in protocols:
            assert evaluate([protocol, *common, *more, *data]) == 0
            result = json.loads(capsys.readouterr().out.splitlines()[-1])
            if protocol == "knn":
                assert [*next(iter(result["scores"].values()))] == ["encoder", "raw_pixels", "random_encoder"]
    assert evaluate(["report", *common]) == 0
    page = (run_dir / "report.html").read_text()
    assert "First row: images." in page
    assert page.count('<figure title="train/') > 3
    assert evaluate(["knn", *common, "data.clips_per_video=2"]) == 2
    assert "set data.clips_per_video=1" in capsys.readouterr().err
    out = tmp_path / "features.npz"
    assert (
        export([f"checkpoint={run_dir}", "format=embeddings", f"out={out}", "progress=false", "device=cpu"])
        == 0
    )
    with np.load(out) as saved:
        assert saved["embedding"].shape == (20, 64)


def test_unreadable_videos_are_listed_and_left_out(run, tmp_path):
    folder = tmp_path / "films"
    for number in range(20):
        write_video(folder / f"{number}.mp4", 6)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"not a video\n" * 50)
    write_video(folder / "still.mp4", 1)
    settings = [*SETTINGS, f"data.root={folder}", "data.max_corrupt=0.2"]
    assert run(*settings)[0] == 0
    listed = {row["key"]: row["reason"] for row in table(tmp_path / "runs/tiny/corrupt.csv")}
    assert listed.keys() == {"empty.mp4", "text.mp4", "still.mp4"}
    assert listed["still.mp4"] == "1 frame, a video needs 2 or more"
    code, _, err = run(*settings, "run.name=strict", "data.max_corrupt=0.05")
    assert (code, "data.max_corrupt=0.05 allows 5.0%" in err) == (3, True)


def test_settings_that_do_not_fit_are_refused(run, clips, tmp_path):
    code, _, err = run("data.frames=4")
    assert (code, "has images, not videos" in err) == (2, True)
    code, _, err = clips("data.frames=1")
    assert (code, "set data.clips_per_video=1" in err) == (2, True)
    code, _, err = clips("data.frames=1", "data.clips_per_video=1")
    assert (code, "encoder.temporal=attention joins the frames of clips" in err) == (2, True)
    write_images(tmp_path / "flat", 3)
    code, _, err = run(*SETTINGS, f"data.root={tmp_path / 'empty'}")
    assert (code, "no such folder" in err) == (2, True)


def test_nothing_is_chosen_for_videos():
    with pytest.raises(UserError, match=r"choose=true looks at images, and data.name=clips has videos"):
        choose_config(["data.root=videos", "data.name=clips"])

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contrastive.augment.views import Views
from contrastive.config import PretrainConfig
from contrastive.config_files import load_saved
from contrastive.data.dataset import open_dataset
from contrastive.encoders.weights import load_encoder
from eval.__main__ import main
from eval.features import PartFeatures
from eval.stats_protocol import StatsConfig, describe_duplicates, find_duplicates, warn_of_shared
from memory_bank import sealed
from tests import tiny
from tests.reference import probe


@pytest.fixture
def photos(tmp_path):
    """Twelve unlabelled images, one of them twice."""
    from PIL import Image

    noise = np.random.default_rng(0)
    (tmp_path / "photos" / "album").mkdir(parents=True)
    for number in range(12):
        pixels = np.kron(noise.integers(0, 255, (4, 4, 3)), np.ones((5, 5, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
        if number == 7:
            Image.fromarray(pixels).save(tmp_path / "photos" / "album" / "again.png")
    return tmp_path / "photos"


def test_unlabelled_images_from_end_to_end(new_run, photos, capsys):
    (photos / "torn.png").write_bytes(b"no picture")
    run = new_run(name="images", root=str(photos))
    assert main(["stats", f"checkpoint={run}", "device=cpu", "progress=false"]) == 0
    told = capsys.readouterr()
    assert f"14 train images of {photos}; test part: none;" in told.err
    assert "unreadable images left out: 1" in told.err
    short = json.loads(told.out.splitlines()[-1])
    result = json.loads((run / "eval" / "stats.json").read_text())
    assert short["verdict"] == result["scores"]["encoder"]["verdict"]
    assert [name for name, found in result["scores"].items() if "verdict" in found] == ["encoder"]
    assert [*result["scores"]] == ["encoder", "raw_pixels", "random_encoder"]
    assert result["data"]["rows"] == {"train": 14}

    with (run / "eval" / "near_duplicates.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {table[0]["first_key"], table[0]["second_key"]} == {"07.png", "album/again.png"}
    assert float(table[0]["similarity"]) == pytest.approx(1, abs=1e-3)
    assert float(table[0]["pixel_similarity"]) == pytest.approx(1, abs=1e-3)
    assert result["near_duplicates"]["listed"] == len(table)

    saved = load_saved(PretrainConfig, run / "config.yaml")
    images, (encoder, _) = open_dataset(saved.data).train, load_encoder(run / "encoder.safetensors")
    pixels = torch.stack([images.read(row) for row in range(13)])
    with torch.no_grad():
        first, second = (
            F.normalize(encoder(view)).double().numpy()
            for view in Views(saved.augment, saved.data, 0)(pixels, torch.arange(13), 0)
        )
    found = result["scores"]["encoder"]
    assert found["alignment"] == pytest.approx(probe.alignment(first, second), rel=1e-3)
    assert len(result["details"]["encoder"]["dimension_std"]) == found["dimensions"] == 64


@pytest.mark.parametrize(
    ("pairs", "listed", "text"),
    [
        (0, 0, "no near-duplicates"),
        (1, 1, "1 pair of near-duplicates, in x.csv"),
        (1200, 1000, "1,200 pairs of near-duplicates, the 1,000 closest in x.csv"),
    ],
)
def test_near_duplicates_in_words(pairs, listed, text):
    found = {"pairs": pairs, "listed": listed, "file": "x.csv"}
    assert describe_duplicates(found) == text
    assert describe_duplicates(found | {"by_parts": {"train-train": pairs}}) == text
    parts = {"train-train": 65, "train-test": 30, "test-test": 5}
    named = text.replace("duplicates,", "duplicates (65 train-train, 30 train-test, 5 test-test),")
    assert describe_duplicates(found | {"by_parts": parts}) == named


def test_pairs_are_counted_by_their_parts_and_those_across_the_split_are_warned_of():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 12, generator=generator)
    for copy, of in ((5, 0), (12, 1), (13, 2), (19, 18)):  # rows 10 to 19 are the test part
        pixels[copy] = pixels[of]
    parts = {
        name: PartFeatures(own, torch.zeros(10, dtype=torch.int64), torch.arange(10))
        for name, own in zip(("train", "test"), pixels.split(10), strict=True)
    }
    settings = StatsConfig(min_similarity=0.999, min_pixel_similarity=0.999)
    found = find_duplicates(settings, torch.device("cpu"), parts, parts)
    assert found.by_parts == {"train-train": 1, "train-test": 2, "test-test": 1}
    (told,) = warn_of_shared(found.by_parts)
    assert told.startswith("2 pairs of near-duplicates with one image in the training and one in the test")
    assert warn_of_shared({"train-train": 3}) == []


def test_labelled_parts_are_searched_together(shared_run, capsys):
    arguments = ["stats", f"checkpoint={shared_run}", "device=cpu", "stats.rows=64", "stats.most_pairs=40"]
    loose = ["stats.min_similarity=0.5", "stats.min_pixel_similarity=0.5"]
    assert main([*arguments, *loose, f"out={shared_run}/twice"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["near_duplicates"]["listed"] == 40
    across = short["near_duplicates"]["by_parts"]["train-test"]
    assert sum(short["near_duplicates"]["by_parts"].values()) == short["near_duplicates"]["pairs"] > 40
    assert any(text.startswith(f"{across:,} pairs of near-duplicates") for text in short["warnings"])
    with (shared_run / "twice" / "near_duplicates.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["first_part"] for row in table} | {row["second_part"] for row in table} == {"train", "test"}
    assert [row["similarity"] for row in table] == sorted((row["similarity"] for row in table), reverse=True)


def test_images_of_one_class_are_no_duplicates(shared_run, capsys):
    """An encoder finds hundreds of pairs of digits alike; those that are in their pixels too are few."""
    arguments = ["stats", f"checkpoint={shared_run}", "device=cpu", "progress=false", "stats.rows=64"]
    found = []
    for least in (-1, 0.97):
        assert main([*arguments, f"stats.min_pixel_similarity={least}", f"out={shared_run}/few"]) == 0
        found.append(json.loads(capsys.readouterr().out)["near_duplicates"]["pairs"])
    assert found[0] > 500
    assert 0 < found[1] < 100
    with (shared_run / "few" / "near_duplicates.csv").open(newline="") as file:
        assert min(float(row["pixel_similarity"]) for row in csv.DictReader(file)) >= 0.97


def test_a_collapse_is_a_warning(new_run, photos, tmp_path, capsys):
    run = new_run(name="images", root=str(photos))
    tensors, meta = sealed.read(run / "encoder.safetensors")
    tensors["conv1.weight"] *= 0
    sealed.write(run / "encoder.safetensors", tensors, meta)
    assert main(["stats", f"checkpoint={run}", "device=cpu"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "complete collapse"
    assert "warning: complete collapse of the features\n" in captured.err
    other = tiny.write_classes(tmp_path / "other", 4, size=(16, 16))
    assert main(["stats", f"checkpoint={run}", "device=cpu", f"data.root={other}"]) == 0
    assert "complete collapse of the features: these images are not the run's own" in capsys.readouterr().err

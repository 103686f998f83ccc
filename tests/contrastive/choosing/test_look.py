"""Test the facts found in real folders: sizes, kinds of images, and how the folder is read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from contrastive.choosing import look
from contrastive.choosing.look import find_source, is_grey, is_two_valued, look_at_folder
from contrastive.config import DataConfig, UserError
from contrastive.data.encoded import FileImages
from contrastive.data.files import list_images, open_imagefolder
from contrastive.data.shards.pack import pack
from tests import tiny


def looked(root: Path, **data):
    return look_at_folder(DataConfig(root=str(root), **data), [f"data.{name}" for name in data])


def save(folder: Path, name: str, pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(folder / name)


@pytest.fixture
def classes(tmp_path):
    """Three class folders of 20 images each."""
    return tiny.write_classes(tmp_path, 20)


def test_sides_and_channels_are_measured(tmp_path):
    for number, (height, width) in enumerate([(40, 90), (90, 40), (60, 60), (200, 100), (30, 31)]):
        save(tmp_path, f"{number}.png", np.full((height, width, 3), (255, 51, 0), np.uint8))
    folder = looked(tmp_path)
    assert (folder.side, folder.small_side) == (40, 30)
    assert folder.mean == [1.0, 0.2, 0.0]
    assert folder.std == [0.0, 0.0, 0.0]
    assert (folder.num_images, folder.looked_at, folder.unreadable) == (5, 5, 0)


def test_kinds_are_counted(tmp_path):
    noise = np.random.default_rng(0)
    save(tmp_path, "colour.png", noise.integers(0, 256, (32, 32, 3), np.uint8))
    save(tmp_path, "grey.png", noise.integers(0, 256, (32, 32), np.uint8))
    save(tmp_path, "deep.png", noise.integers(0, 65536, (32, 32)).astype(np.uint16))
    save(tmp_path, "alpha.png", noise.integers(0, 256, (32, 32, 4), np.uint8))
    save(tmp_path, "bits.png", noise.integers(0, 2, (32, 32)) > 0)
    folder = looked(tmp_path)
    assert (folder.grey, folder.deep, folder.alpha, folder.two_valued) == (0.6, 0.2, 0.2, 0.2)
    assert "60% grey" in str(folder)


def test_a_fourth_band_is_told_from_transparency(tmp_path):
    colours, opaque = np.full((32, 32, 3), 90, np.uint8), np.full((32, 32, 1), 255, np.uint8)
    cut_out = opaque.copy()
    cut_out[:14], cut_out[14:18] = 0, 100
    infrared = np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8)
    for name, fourth in (("opaque", opaque), ("cut-out", cut_out), ("infrared", infrared)):
        save(tmp_path, f"{name}.png", np.dstack([colours, fourth]))
    save(tmp_path, "three.png", colours)
    folder = looked(tmp_path)
    assert (folder.alpha, folder.fourth_band) == (0.75, 0.25)


def write_deep(folder: Path, brightest: Sequence[int]) -> None:
    """Write grey files of 16 bits: half of each is black, half has the value."""
    for number, value in enumerate(brightest):
        save(
            folder, f"{number:03}.png", np.repeat(np.array([[0, value]], np.uint16), 32, axis=0).repeat(16, 1)
        )


@pytest.mark.parametrize(
    ("brightest", "white"),
    [([4000, 900], 4095), ([4096], 8191), ([65535, 900], 65535), ([17], 255), ([0], 255)],
)
def test_the_white_of_files_of_16_bits_is_what_their_values_need(tmp_path, brightest, white):
    write_deep(tmp_path, brightest)
    folder = looked(tmp_path)
    assert folder.white == white
    assert folder.mean == pytest.approx([np.mean(brightest) / 2 / white] * 3, abs=0.003)


def test_one_file_in_a_hundred_does_not_decide_the_white(tmp_path):
    write_deep(tmp_path, [4000] * 199 + [60000])
    assert looked(tmp_path).white == 4095
    write_deep(tmp_path, [4000] * 180 + [60000] * 20)
    assert looked(tmp_path).white == 65535


def test_files_of_fewer_bits_than_others_are_counted(tmp_path):
    write_deep(tmp_path, [4000, 65535, 900, 8400, 8191])
    folder = looked(tmp_path)
    assert (folder.white, folder.dark, folder.white_of_dark) == (65535, 0.6, 8191)
    folder = looked(tmp_path, white=8191)
    assert (folder.dark, folder.white_of_dark) == (0.2, 1023)
    folder = looked(tmp_path, white=4095)
    assert (folder.dark, folder.white_of_dark) == (0.0, 65535)


def test_a_stated_white_is_kept_and_files_of_8_bits_need_none(tmp_path):
    write_deep(tmp_path / "deep", [4000])
    folder = looked(tmp_path / "deep", white=8000)
    assert folder.white == 8000
    assert folder.mean == [0.251] * 3  # 4000 / 8000 in every second column, rounded to 128 of 255
    save(tmp_path / "shallow", "a.png", np.full((32, 32), 15, np.uint8))
    assert looked(tmp_path / "shallow").white == 65535


def test_a_faint_tint_is_grey_and_a_colour_is_not():
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    assert is_grey(np.dstack([ramp, ramp + 8, ramp]))  # as JPEG files of grey images have
    assert not is_grey(np.dstack([ramp, ramp, ramp // 2]))


def test_writing_has_two_brightnesses_and_a_picture_has_not():
    page = Image.new("RGB", (600, 800), "white")
    for line in range(30):
        ImageDraw.Draw(page).text((20, 20 + 25 * line), "the quick brown fox jumps over it " * 3, "black")
    assert is_two_valued(np.asarray(page))
    noise = np.random.default_rng(0).normal(128, 40, (64, 64, 1)).clip(0, 255).astype(np.uint8)
    assert not is_two_valued(np.repeat(noise, 3, 2))
    assert not is_two_valued(np.full((8, 8, 3), 7, np.uint8))


def test_files_that_cannot_be_read_are_counted(tmp_path):
    tiny.write_images(tmp_path, 6)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:100])
    folder = looked(tmp_path)
    assert (folder.looked_at, folder.unreadable) == (4, 2)
    assert "2 of 6 cannot be read" in str(folder)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the images .* \(.*0.png: not an image of a known format\)"):
        looked(tmp_path)


def test_a_large_folder_is_sampled_evenly_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "SAMPLE", 8)
    sides = [10 + number for number in range(64)]
    for number, side in enumerate(sides):
        save(tmp_path, f"{number:02}.png", np.zeros((side, side, 3), np.uint8))
    folder = looked(tmp_path)
    assert (folder.num_images, folder.looked_at) == (64, 8)
    assert abs(folder.side - np.median(sides)) < 4
    assert folder == looked(tmp_path)


def test_of_large_files_fewer_are_decoded(tmp_path, monkeypatch):
    """Every second one is white; the black ones between are not decoded."""
    for number in range(64):
        save(tmp_path, f"{number:02}.png", np.full((9, 9, 3), 255 * (number % 2 == 0), np.uint8))
    assert looked(tmp_path).mean == [0.5, 0.5, 0.5]
    monkeypatch.setattr(look, "BYTES_OF_PIXELS", 1)
    monkeypatch.setattr(look, "PIXELS_OF", 32)
    folder = looked(tmp_path)
    assert folder.mean == [1.0, 1.0, 1.0]
    assert folder.looked_at == 64


def test_class_folders_are_read_as_such_and_some_images_are_held_out(classes):
    folder = looked(classes)
    assert folder.source == "imagefolder"
    assert "3 class folders; one image in five is held out" in folder.why
    assert folder.num_images < 60


def test_parts_are_used_as_given(classes):
    (classes / "val").mkdir()
    for name in ("red", "green", "blue"):
        (classes / name).rename(classes / "val" / name)
        tiny.write_images(classes / "train" / name, 6)
    folder = looked(classes)
    assert (folder.source, folder.num_images) == ("imagefolder", 18)
    assert "train/ is trained on, val/ is left for scores" in folder.why


def test_any_other_tree_is_read_as_images(classes, tmp_path_factory):
    flat, few, tiny_set, albums = (tmp_path_factory.mktemp(name) for name in ("flat", "few", "set", "albums"))
    tiny.write_images(flat, 5)
    assert find_source(flat) == ("images", "all images lie in no class folder (0.png, 1.png, ...)")
    tiny.write_images(few / "one", 5)
    assert find_source(few) == ("images", "all images lie in one folder (one)")
    for name in "ab":
        tiny.write_images(tiny_set / name, 10)
    assert find_source(tiny_set) == ("images", "20 images are too few to hold some out for scores")
    for number in range(20):
        tiny.write_images(albums / str(number), 3)
    assert find_source(albums)[1] == "20 folders of typically 3 images are hardly classes"
    tiny.write_images(classes, 1)
    source, why = find_source(classes)
    assert source == "images"
    assert why.startswith(
        "1 of 61 images lie in no class folder (0.png), so the 3 folders of the other 60 are not read as "
        "classes and no image is held out for scores"
    )
    assert why.endswith("move the loose images into them or out of data.root)")
    tiny.write_images(albums, 1)
    assert find_source(albums)[1] == "1 of 61 images lie in no class folder (0.png)"  # hardly classes
    assert (looked(classes).num_images, looked(classes).labelled) == (61, False)


def test_parts_without_class_folders_are_both_trained_on_and_said_so(tmp_path):
    for name in ("train", "test"):
        tiny.write_images(tmp_path / name, 5)
    source, why = find_source(tmp_path)
    assert source == "images"
    assert "train/ and test/ are both trained on" in why


def test_folders_that_may_be_parts_or_classes_are_not_guessed(tmp_path):
    for part in ("train", "extra"):
        for name in ("a", "b"):
            tiny.write_images(tmp_path / part / name, 5)
    with pytest.raises(UserError, match="may be parts of one data set, or classes"):
        looked(tmp_path)
    assert looked(tmp_path, name="images").source == "images"


def test_a_stated_source_is_kept_and_not_explained(classes):
    assert (looked(classes, name="images").source, looked(classes, name="images").why) == ("images", "")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "no such folder; set data.root"),
        (lambda root: root.mkdir(), "no image file below it"),
        (lambda root: root.write_text("hello"), "is a file, a folder is needed"),
    ],
)
def test_what_is_no_folder_of_images_is_refused(tmp_path, make, words):
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=words):
        looked(tmp_path / "photos")


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "photos.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"photos.tar.gz: is an archive; unpack it"):
        looked(tmp_path / "photos.tar.gz")


def test_shards_are_looked_at_as_the_folder_that_was_packed(classes, tmp_path_factory):
    source, out = open_imagefolder(DataConfig(root=str(classes))), tmp_path_factory.mktemp("set")
    for images, part in ((source.train, "train"), (source.test, "test")):
        pack(images, out / part, shard_bytes=2**20, shuffle=False)
    folder, found = looked(classes), looked(out)
    assert (found.source, found.why) == ("shards", "shards.json lists them")
    assert replace(found, root=folder.root, source=folder.source, why=folder.why) == folder
    whole = FileImages(classes, list_images(classes), 32, torch.arange(60) // 20)
    pack(whole, out / "whole", shard_bytes=2**20, shuffle=False)
    assert looked(out / "whole").num_images == folder.num_images  # the same are held out
    pack(FileImages(classes, list_images(classes), 32), out / "bare", shard_bytes=2**20, shuffle=False)
    assert (folder.labelled, looked(out / "whole").labelled, looked(out / "bare").labelled) == (1, 1, 0)


def test_other_data_that_can_be_trained_on_is_named(tmp_path):
    (tmp_path / "films" / "a").mkdir(parents=True)
    (tmp_path / "films" / "a" / "b.mp4").touch()
    with pytest.raises(UserError, match=r"films: holds videos, .*use --config clips data.root=\S*films,"):
        looked(tmp_path / "films")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    with pytest.raises(UserError, match="holds tar files without an index; run contrastive-shards index"):
        looked(tmp_path / "tars")


def test_a_source_that_is_no_folder_of_files_is_refused():
    with pytest.raises(UserError, match=r"data.name=digits: settings are chosen for image files alone"):
        look_at_folder(DataConfig(name="digits"), ["data.name"])

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import DataConfig
from contrastive.data.dataset import open_dataset
from contrastive.data.digits import open_digits
from contrastive.data.files import open_class_folders, open_tree
from contrastive.data.image_list import ImageList, write_image_list
from contrastive.data.shards.pack import pack
from contrastive.data.wrapped import SomeImages
from eval import leakage
from eval.features import Features, PartFeatures
from eval.leakage import describe_pretrained, find_pretrained, warn_of_untrained
from tests.eval.conftest import make_run

FOLDER = DataConfig(name="images")


def leaked(run, test, own):
    """Return the warning if every test image is scored."""
    return find_pretrained(run, test, own, range(len(test)))[1]


def features(train, test, classes):
    def split(labels):
        return PartFeatures(torch.zeros(len(labels), 2), torch.tensor(labels), torch.arange(len(labels)))

    return Features(split(train), split(test), classes)


def test_test_classes_without_a_training_image_are_counted_and_named():
    assert warn_of_untrained(features([0, 1, 1], [0, 0, 1], ("a", "b"))) == []
    (told,) = warn_of_untrained(features([0], [0, 1, 2, 2], ("a", "b", "c")))
    assert told.startswith("3 of 4 test images are of 2 classes without a training image (b, c), which")
    assert told.endswith("; add images of them to train")
    names = tuple(f"r{number}" for number in range(9))
    assert "(r1, r2, r3, r4, r5, ...)" in warn_of_untrained(features([0], [*range(9)], names))[0]


@pytest.fixture
def photos(tmp_path):
    """40 images in two class folders, and a run that was trained on all of them as one tree."""
    for row in range(40):
        folder = tmp_path / "photos" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8 + row, 3), row, dtype=np.uint8)).save(folder / f"{row}.png")
    run = make_run(tmp_path / "run", name="images", root=str(tmp_path / "photos"))
    write_image_list(run / "manifest.csv", open_tree(tmp_path / "photos", 8))
    return tmp_path / "photos", run


def test_test_images_that_were_pretrained_on_are_counted(photos, tmp_path):
    root, run = photos
    train, test, _ = open_class_folders(root, 8)
    (told,) = leaked(run, test, FOLDER)
    assert told.startswith(
        f"{len(test)} of {len(test)} test images were pretrained on (manifest.csv of {run})"
    )
    found, _ = find_pretrained(run, test, FOLDER, range(len(test)))
    assert found == {"count": len(test), "scored": len(test)}
    assert told.startswith(describe_pretrained(found, "images"))
    (tmp_path / "link").symlink_to(root)
    assert leaked(run, open_class_folders(tmp_path / "link", 8)[1], FOLDER) == [told]
    assert "20 of 20 test" in leaked(run, open_tree(root / "a", 8), FOLDER)[0]  # a part of the tree
    write_image_list(run / "manifest.csv", train)
    assert leaked(run, test, FOLDER) == []
    shutil.copytree(root / "a", tmp_path / "copies" / "x")
    copies = open_tree(tmp_path / "copies", 8)
    trained_on = sum(key.startswith("a/") for key in map(train.key, range(len(train))))
    assert f"{trained_on} of 20 test images" in leaked(run, copies, FOLDER)[0]
    for row in range(20):  # of the same name and size alone
        content = Path(os.fsdecode(copies.path(row))).read_bytes()
        Path(os.fsdecode(copies.path(row))).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert leaked(run, copies, FOLDER) == []
    os.rename(root / "a", tmp_path / "a")  # other images than those of the run
    assert leaked(run, open_tree(tmp_path / "a", 8), FOLDER) == []


def test_renamed_copies_are_found_unless_that_means_to_read_too_much(photos, tmp_path, monkeypatch):
    root, run = photos
    (tmp_path / "renamed").mkdir()
    for row in range(6):
        shutil.copy(root / "ab"[row % 2] / f"{row}.png", tmp_path / "renamed" / f"{5 - row}.png")
    renamed = open_tree(tmp_path / "renamed", 8)
    assert "6 of 6 test images" in leaked(run, renamed, FOLDER)[0]
    monkeypatch.setattr(leakage, "_MOST_READ", 100)
    assert leaked(run, renamed, FOLDER) == []


def test_who_scores_the_folder_of_the_run_is_told_to_leave_some_out(photos):
    root, run = photos
    own = DataConfig(name="images", root=str(root))
    assert leaked(run, open_tree(root, 8), own)[0].endswith(
        "; score images that were left out of the folder that was pretrained on"
    )


def test_files_that_cannot_be_read_are_no_copies_and_those_of_one_folder_are_named_so(tmp_path):
    """Two empty files of one name are equal; only what is scored counts."""
    for number in range(40):
        folder = tmp_path / "photos" / "ab"[number % 2] / str(number)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8 + number, 3), number, dtype=np.uint8)).save(folder / "0.png")
    train, test, _ = open_class_folders(tmp_path / "photos", 8)
    for images in (train, test):
        Path(os.fsdecode(images.path(0))).write_bytes(b"")
    shutil.copy(os.fsdecode(train.path(1)), os.fsdecode(test.path(1)))
    train, test, _ = open_class_folders(tmp_path / "photos", 8)
    run = make_run(tmp_path / "run", name="imagefolder", root=str(tmp_path / "photos"))
    write_image_list(run / "manifest.csv", train)
    found, (told,) = find_pretrained(run, test, FOLDER, range(1, len(test)))
    assert told.startswith(f"1 of {len(test) - 1} test images have the content of images that were")
    assert found == {"count": 1, "scored": len(test) - 1}
    assert "the folder holds copies in its training and its test part" in told
    assert "data.root" not in told  # it is the same already
    assert find_pretrained(run, test, FOLDER, range(2, len(test))) == ({}, [])


def test_images_that_were_moved_since_are_known_by_relative_path_and_size(photos, tmp_path):
    root, run = photos
    moved = root.rename(tmp_path / "moved")
    test = open_class_folders(moved, 8)[1]
    assert f"{len(test)} of {len(test)} test images" in leaked(run, test, FOLDER)[0]
    with open(test.path(0), "ab") as file:
        file.write(b"more")
    assert f"{len(test) - 1} of {len(test)} test images" in leaked(run, test, FOLDER)[0]


def test_what_is_not_known_of_pretraining_is_no_failure(photos):
    root, run = photos
    images, digits = open_tree(root, 8), open_digits(DataConfig(image_size=8))
    assert leaked(None, images, FOLDER) == leaked(run, digits.test, FOLDER) == []
    (run / "manifest.csv").write_text("torn")
    assert "manifest.csv: not a manifest" in leaked(run, images, FOLDER)[0]
    (run / "manifest.csv").unlink()
    assert leaked(run, images, FOLDER) == []


def test_samples_of_shards_are_compared_and_what_cannot_be_is_said(photos, tmp_path):
    root, _ = photos
    pack(open_tree(root, 8), tmp_path / "set", shard_bytes=2**20, shuffle=True)
    settings = DataConfig(name="shards", root=str(tmp_path / "set"), image_size=8)
    packed = open_dataset(settings).train
    run = make_run(tmp_path / "other", name="shards", root=settings.root)
    write_image_list(run / "manifest.csv", SomeImages(packed, torch.arange(25)))
    scored = SomeImages(packed, torch.arange(20, 40))
    (told,) = leaked(run, scored, settings)
    assert told.startswith(f"5 of 20 test images were pretrained on (manifest.csv of {run})")
    found, (told,) = find_pretrained(run, open_tree(root, 8), FOLDER, range(40))
    assert told.startswith("not known whether test images were pretrained on: the run read data.name=shards")
    assert describe_pretrained(found, "images") == ""
    run = make_run(tmp_path / "third", name="hf", root="b")
    write_image_list(run / "manifest.csv", scored)
    assert "data.name=hf data.root=b" in leaked(run, scored, DataConfig(name="hf", root="a"))[0]
    assert "20 of 20 test" in leaked(run, scored, DataConfig(name="hf", root="b"))[0]


def test_files_of_one_size_are_each_read_once(tmp_path):
    """Frames in folders: all are 0.bmp, and equally large."""
    rng = np.random.default_rng(0)
    for folder in ("old/a", "old/b", "new/c", "new/d"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / folder / "0.bmp")
    shutil.copy(tmp_path / "old/b/0.bmp", tmp_path / "new/d")
    old, new = open_tree(tmp_path / "old", 8), open_tree(tmp_path / "new", 8)
    keys = [*map(old.key, range(2)), "gone/0.bmp"]
    copies = leakage._Copies(str(tmp_path / "old"), ImageList(keys, [old.stamp(0)] * 3), {old.stamp(0)})
    with patch("eval.leakage._hash", side_effect=leakage._hash) as hashed:
        assert [copies.hold(new, row, new.stamp(row)) for row in (0, 1, 0)] == [False, True, False]
    assert hashed.call_count == 3 + 3  # those listed, of which one is gone, and those asked for

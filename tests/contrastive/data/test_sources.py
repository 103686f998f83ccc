import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.sources import SOURCES, open_eval, open_held_out, open_labelled_train, open_train


def keys(images):
    return {images.key(row) for row in range(len(images))}


def test_digits_have_a_fixed_quarter_held_out():
    data = DataConfig(name="digits", image_size=16)
    train, test, by_hash = open_eval(data)
    assert not by_hash
    assert (len(train), len(test)) == (1335, 462)
    assert not keys(train) & keys(test)
    assert keys(train) | keys(test) == {f"digits/{row}" for row in range(1797)}
    assert keys(open_train(data)) == keys(train)
    assert keys(open_held_out(data)) == keys(test)
    assert keys(open_labelled_train(data)) == keys(train)
    assert [test.key(row) for row in range(4)] == ["digits/0", "digits/1", "digits/2", "digits/4"]
    assert torch.bincount(test.labels).min() >= 30  # no class is missing, without having been balanced


def test_digits_are_the_digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train = open_train(DataConfig(name="digits", image_size=8))
    assert train.classes == [str(digit) for digit in range(10)]
    for row in (0, 500, 1334):
        source = int(train.key(row).split("/")[1])
        wanted = np.round(bunch.images[source] / 16 * 255)
        assert np.array_equal(train.read(row).numpy(), np.stack([wanted] * 3))
        assert train.labels[row] == bunch.target[source]
    larger = open_train(DataConfig(name="digits", image_size=32, decode_size=20)).read(0)
    assert larger.shape == (3, 20, 20)
    assert torch.equal(larger[0], larger[1])
    assert abs(larger.float().mean() - train.read(0).float().mean()) < 3


def test_digits_name_the_package_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_train(DataConfig(name="digits"))


def test_images_train_but_cannot_be_evaluated(tmp_path, write_image):
    write_image("a/1.png")
    write_image("2.png")
    data = DataConfig(name="images", root=str(tmp_path), image_size=8)
    assert keys(open_train(data)) == {"a/1.png", "2.png"}
    assert open_held_out(data) is None
    assert open_labelled_train(data) is None
    with pytest.raises(UserError, match=r"data.name=images has no labels.*data.name=imagefolder"):
        open_eval(data)


def test_imagefolder_trains_on_the_training_part_only(tmp_path, write_image):
    for number in range(50):
        write_image(f"{'ab'[number % 2]}/{number}.png")
    data = DataConfig(name="imagefolder", root=str(tmp_path), image_size=8)
    train, test, by_hash = open_eval(data)
    assert by_hash
    assert keys(open_train(data)) == keys(train)
    assert keys(open_held_out(data)) == keys(test)


def test_the_home_folder_may_be_abbreviated(tmp_path, write_image, monkeypatch):
    write_image("1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_train(DataConfig(name="images", root="~", image_size=8))) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("imagefoldr", "did you mean 'imagefolder'"),
        ("CIFAR10", "did you mean 'cifar10'"),
        ("qqqq", "allowed are digits, imagefolder, images"),
        ("imagenett", "did you mean 'imagenet'"),
    ],
)
def test_unknown_sources(name, said):
    for opened in (open_train, open_eval, open_held_out, open_labelled_train):
        with pytest.raises(UserError, match=said):
            opened(DataConfig(name=name))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "digits"])
def test_a_root_is_needed(name):
    with pytest.raises(UserError, match=r"data.root is not set.*data.root=PATH"):
        open_train(DataConfig(name=name))


@pytest.mark.parametrize("name", ["imagefolder", "images"])
def test_a_missing_root_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/none: no such folder"):
        open_train(DataConfig(name=name, root=str(Path(tmp_path) / "none")))

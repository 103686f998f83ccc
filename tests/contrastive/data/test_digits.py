import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import open_dataset


def keys(images):
    return {images.key(row) for row in range(len(images))}


def test_digits_have_a_fixed_quarter_held_out():
    data = DataConfig(name="digits", image_size=16)
    dataset = open_dataset(data)
    train, test = dataset.train, dataset.test
    assert dataset.labelled is train
    assert not dataset.held_out_by_hash
    assert (len(train), len(test)) == (1335, 462)
    assert not keys(train) & keys(test)
    assert keys(train) | keys(test) == {f"digits/{row}" for row in range(1797)}
    assert [test.key(row) for row in range(4)] == ["digits/0", "digits/1", "digits/2", "digits/4"]
    assert torch.bincount(test.labels).min() >= 30  # no class is missing, without having been balanced


def test_digits_are_the_digits():
    bunch = load_digits()
    train = open_dataset(DataConfig(name="digits", image_size=8)).train
    assert train.classes == [str(digit) for digit in range(10)]
    for row in (0, 500, 1334):
        source = int(train.key(row).split("/")[1])
        wanted = np.round(bunch.images[source] / 16 * 255)
        assert np.array_equal(train.read(row).numpy(), np.stack([wanted] * 3))
        assert train.labels[row] == bunch.target[source]
    larger = open_dataset(DataConfig(name="digits", image_size=32, decode_size=20)).train.read(0)
    assert larger.shape == (3, 20, 20)
    assert torch.equal(larger[0], larger[1])
    assert abs(larger.float().mean() - train.read(0).float().mean()) < 3


def test_digits_name_the_package_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_dataset(DataConfig(name="digits"))


def test_digits_refuse_a_folder():
    with pytest.raises(UserError, match=r"data.root=photos: data.name=digits reads no folder"):
        open_dataset(DataConfig(name="digits", root="photos"))

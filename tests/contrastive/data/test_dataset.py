from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset, as_dataset, open_dataset
from contrastive.data.torch_dataset import DatasetImages
from contrastive.registry import DATASETS

EIGHT = DataConfig(image_size=8)


def keys(images):
    return {images.key(row) for row in range(len(images))}


def test_images_train_but_cannot_be_evaluated(tmp_path, write_image):
    write_image("a/1.png")
    write_image("2.png")
    dataset = open_dataset(DataConfig(name="images", root=str(tmp_path), image_size=8))
    assert keys(dataset.train) == {"a/1.png", "2.png"}
    assert dataset.labelled is dataset.test is None
    with pytest.raises(UserError, match=r"data.name=images has no labels.*data.name=imagefolder"):
        dataset.labelled_parts("images")


def test_imagefolder_trains_on_the_training_part_only(tmp_path, write_image):
    for number in range(50):
        write_image(f"{'ab'[number % 2]}/{number}.png")
    data = DataConfig(name="imagefolder", root=str(tmp_path), image_size=8)
    dataset = open_dataset(data)
    assert dataset.held_out_by_hash
    assert dataset.labelled is dataset.train
    assert not keys(dataset.train) & keys(dataset.test)
    assert len(dataset.train) + len(dataset.test) == 50


def test_the_home_folder_may_be_abbreviated(tmp_path, write_image, monkeypatch):
    write_image("1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_dataset(DataConfig(name="images", root="~", image_size=8)).train) == 1


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
    with pytest.raises(UserError, match=said):
        open_dataset(DataConfig(name=name))


@pytest.mark.parametrize("name", [name for name in DATASETS if "digits" not in name])
def test_a_root_is_needed(name):
    with pytest.raises(UserError, match=r"data.root is not set.*data.root=PATH"):
        open_dataset(DataConfig(name=name))


@pytest.mark.parametrize("name", ["imagefolder", "images"])
def test_a_missing_root_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/none: no such folder"):
        open_dataset(DataConfig(name=name, root=str(Path(tmp_path) / "none")))


def images(rows=4, size=8, labels=None):
    return DatasetImages([torch.zeros(3, size, size, dtype=torch.uint8)] * rows, size, labels=labels)


def test_images_of_a_program_cannot_be_opened_by_name():
    with pytest.raises(
        UserError, match=r"data.name=dataset: .*data.name and data.root.*evaluate\(.*dataset="
    ):
        open_dataset(DataConfig(name="dataset"))


def test_a_torch_dataset_is_wrapped_without_labels():
    data = TensorDataset(torch.full((5, 3, 8, 8), 7, dtype=torch.uint8))
    dataset = as_dataset(data, DataConfig(image_size=12))
    assert (len(dataset.train), dataset.labelled, dataset.test) == (5, None, None)
    assert torch.equal(dataset.train.read(4), torch.full((3, 12, 12), 7, dtype=torch.uint8))


def test_the_white_of_the_settings_is_that_of_a_torch_dataset():
    picture = Image.fromarray(np.full((8, 8), 4095, np.uint16))
    dataset = as_dataset([picture], DataConfig(image_size=8, white=4095))
    assert dataset.train.read(0).unique().tolist() == [255]


def test_monitors_get_the_rows_whose_label_is_known():
    assert as_dataset(images(labels=[0, 1, 1, 0]), EIGHT).labelled is not None
    assert as_dataset(images(labels=[-1] * 4), EIGHT).labelled is None
    some = as_dataset(images(labels=[0, -1, 1, -1]), EIGHT)
    assert len(some.train) == 4
    assert (keys(some.labelled), some.labelled.labels.tolist()) == ({"dataset/0", "dataset/2"}, [0, 1])


def test_parts_are_passed_on_as_they_are():
    dataset = Dataset(images(), images(2, labels=[0, 1]), images(1, labels=[0]))
    assert as_dataset(dataset, EIGHT) is dataset
    with pytest.raises(UserError, match=r"squares of 9 px, the settings ask for 8 px"):
        as_dataset(Dataset(images(), test=images(1, 9)), EIGHT)


def test_a_data_set_with_labels_and_no_test_part_cannot_be_evaluated():
    with pytest.raises(UserError, match=r"data.name=mine has no test part, evaluation needs one"):
        as_dataset(images(labels=[0, 1, 1, 0]), EIGHT).labelled_parts("mine")


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_stream_is_refused():
    with pytest.raises(UserError, match=r"images=Endless: .*give a map-style Dataset"):
        as_dataset(Endless(), EIGHT)

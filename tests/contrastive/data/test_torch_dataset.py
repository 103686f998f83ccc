import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import UserError
from contrastive.data.decode import Unreadable
from contrastive.data.images import fingerprint
from contrastive.data.torch_dataset import DatasetImages
from contrastive.data.wrapped import SomeImages


def pixels(n, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


class Given:
    """A data set of someone's own, with one broken row."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        if isinstance(self.items[row], Exception):
            raise self.items[row]
        return self.items[row]


def test_a_data_set_of_ones_own():
    array = pixels(1)[0]
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    items = [
        Image.fromarray(array),
        tensor,
        (Image.fromarray(array), 3),
        [tensor, 1, 2],
        OSError("torn page"),
    ]
    images = DatasetImages(Given(items), 4, labels=torch.arange(5))
    for row in range(4):
        assert torch.equal(images.read(row), tensor)
    assert len({images.content(row) for row in range(4)}) == 1
    assert images.key(2) == "dataset/2"
    with pytest.raises(Unreadable, match="OSError: torn page"):
        images.read(4)
    assert images.content(4) == "unreadable"
    assert images.classes == ["0", "1", "2", "3", "4"]


def test_pictures_of_a_dataset_have_its_white(deep):
    with Image.open(deep / "a.png") as picture:
        images = DatasetImages([picture], 4)
        images.white = 4095
        assert images.read(0).unique().tolist() == [255]


def test_labels_that_do_not_fit_a_data_set_of_ones_own_are_refused():
    with pytest.raises(UserError, match="labels: 2 for 3 images"):
        DatasetImages(Given([0, 0, 0]), 4, labels=[0, 1])


class Stamped(Given):
    def stamp(self, row):
        return f"version {row}"


def test_the_manifest_of_a_data_set_of_ones_own_decodes_nothing():
    """Its fingerprint does, where the set has no stamps: caches must not mix up two sets of one length."""
    unread = [OSError("read")] * 2
    assert [*DatasetImages(Given(unread), 4).manifest()] == [(0, "dataset/0", ""), (1, "dataset/1", "")]
    assert [*DatasetImages(Stamped(unread), 4).manifest()][1] == (1, "dataset/1", "version 1")
    sets = [DatasetImages(Given([Image.fromarray(pixels(1, seed=seed)[0])]), 4) for seed in (0, 0, 1)]
    assert sets[0].fingerprint() == sets[1].fingerprint() != sets[2].fingerprint()
    assert len({SomeImages(images, torch.tensor([0])).fingerprint() for images in sets}) == 2
    stamped = DatasetImages(Stamped(unread), 4)
    assert stamped.fingerprint() == fingerprint([("dataset/0", "version 0"), ("dataset/1", "version 1")])


@pytest.mark.parametrize(
    ("item", "named"),
    [(torch.zeros(3, 4, 4), "float32"), (torch.zeros(1, 4, 4, dtype=torch.uint8), "1, 4, 4"), (3, "int")],
)
def test_a_data_set_of_the_wrong_kind_is_a_mistake_not_a_corrupt_image(item, named):
    with pytest.raises(TypeError, match=rf"dataset\[0\] is .*{named}.*PIL image or a uint8"):
        DatasetImages(Given([item]), 4).read(0)

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import UserError
from contrastive.data.decode import Unreadable
from contrastive.data.images import ArrayImages, DatasetImages, FileImages, SomeImages, fingerprint


def pixels(n, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_array_rows_follow_each_other_over_several_arrays():
    first, second = pixels(3), pixels(2, seed=1)
    images = ArrayImages("set", [first, second], 4)
    assert len(images) == 5
    for row, wanted in enumerate([*first, *second]):
        assert np.array_equal(images.read(row).numpy(), wanted.transpose(2, 0, 1))
        assert images.key(row) == f"set/{row}"
        assert images.stamp(row) == hashlib.sha256(wanted.tobytes()).hexdigest()[:16]


def test_a_subset_keeps_the_numbers_of_its_source():
    source = pixels(6)
    images = ArrayImages("set", [source], 4, rows=np.array([5, 2]), labels=torch.tensor([1, 0]))
    assert [images.key(row) for row in range(2)] == ["set/5", "set/2"]
    assert np.array_equal(images.read(0).numpy(), source[5].transpose(2, 0, 1))
    assert images.labels.tolist() == [1, 0]


def test_arrays_of_another_size_are_resized():
    images = ArrayImages("set", [np.full((1, 4, 4, 3), 77, dtype=np.uint8)], 10)
    assert torch.equal(images.read(0), torch.full((3, 10, 10), 77, dtype=torch.uint8))


def test_what_is_read_may_be_written_to():
    source = pixels(1)
    kept = source.copy()
    ArrayImages("set", [source], 4).read(0).zero_()
    assert np.array_equal(source, kept)


@pytest.fixture
def deep(tmp_path):
    """A grey file of 16 bits whose values are those of 12."""
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "a.png")
    return tmp_path


def test_a_subset_of_files_has_the_white_of_all(deep):
    images = FileImages(deep, [b"a.png"], 4)
    subset = SomeImages(images, torch.tensor([0]))
    assert images.read(0).unique().tolist() == [16]
    subset.white = 4095
    assert (subset.white, images.white) == (4095, 4095)
    assert images.read(0).unique().tolist() == subset.read(0).unique().tolist() == [255]
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert not images.read_into(pixels, [0])
    assert pixels.unique().tolist() == [255]


def test_pictures_of_a_dataset_have_its_white(deep):
    with Image.open(deep / "a.png") as picture:
        images = DatasetImages([picture], 4)
        images.white = 4095
        assert images.read(0).unique().tolist() == [255]


def test_images_of_another_white_are_others_for_caches_and_results(deep):
    images = FileImages(deep, [b"a.png"], 4)
    prints = images.fingerprint(), images.revision()
    assert prints[0] == fingerprint([("a.png", images.content(0))])  # as before there was a white
    assert prints[1] == fingerprint([("a.png", images.version(0))])
    images.white = 4095
    assert images.fingerprint() != prints[0]
    assert images.revision() != prints[1]


def test_fingerprint_tells_keys_sizes_and_order_apart():
    rows = [("a", "1"), ("b", "2")]
    others = [
        [("b", "2"), ("a", "1")],
        [("a", "1")],
        [("a", "12"), ("b", "")],
        [("a1", ""), ("b", "2")],
        [("a", "1"), ("b", "3")],
    ]
    prints = {fingerprint(each) for each in [rows, *others]}
    assert len(prints) == 6
    assert fingerprint(rows) == hashlib.sha256(b"a\x001\x00b\x002\x00").hexdigest()


def test_a_changed_pixel_changes_the_fingerprint():
    source = pixels(3)
    before = ArrayImages("set", [source], 4).fingerprint()
    source[1, 2, 3, 0] ^= 1
    assert ArrayImages("set", [source], 4).fingerprint() != before


def test_file_names_take_little_memory():
    """An ImageNet's worth of names: a list of str would take over 110 bytes each."""
    keys = [b"train/n%08d/n%08d_%d.JPEG" % (n % 1000, n % 1000, n) for n in range(50_000)]
    images = FileImages("/data", keys, 8)
    assert [images.key(row) for row in (0, 1, 49_999)] == [keys[row].decode() for row in (0, 1, 49_999)]
    assert len(pickle.dumps(images)) < 50 * len(keys)
    for row in (-1, 50_000):
        with pytest.raises(IndexError, match="there are 50000 images"):
            images.key(row)


def test_a_bitmap_that_keeps_its_size_gets_another_version_also_in_a_subset(tmp_path):
    """Caches of decoded images use it; the fingerprint, which a copy of the files keeps, stays."""
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.bmp")
    files = FileImages(tmp_path, [b"a.bmp"], 4)
    sets = [files, SomeImages(files, torch.tensor([0]))]
    before = [(images.fingerprint(), images.revision()) for images in sets]
    Image.fromarray(pixels(1, seed=1)[0]).save(tmp_path / "a.bmp")
    os.utime(tmp_path / "a.bmp", ns=(0, 0))
    for images, (fingerprinted, revised) in zip(sets, before, strict=True):
        assert images.fingerprint() == fingerprinted
        assert images.revision() != revised


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


def test_a_subset_reads_its_rows_together(monkeypatch):
    images = ArrayImages("set", [pixels(6)], 4)
    asked = []

    def read_into(self, pixels, rows):
        asked.append(list(rows))
        return {4: "broken"}

    monkeypatch.setattr(ArrayImages, "read_into", read_into)
    some = SomeImages(images, torch.tensor([5, 4, 1]))
    assert some.read_into(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), range(1, 3)) == {1: "broken"}
    assert asked == [[4, 1]]


@pytest.mark.parametrize(
    ("item", "named"),
    [(torch.zeros(3, 4, 4), "float32"), (torch.zeros(1, 4, 4, dtype=torch.uint8), "1, 4, 4"), (3, "int")],
)
def test_a_data_set_of_the_wrong_kind_is_a_mistake_not_a_corrupt_image(item, named):
    with pytest.raises(TypeError, match=rf"dataset\[0\] is .*{named}.*PIL image or a uint8"):
        DatasetImages(Given([item]), 4).read(0)


def test_some_rows_of_another_set_keep_pixels_keys_stamps_and_labels():
    whole = ArrayImages("set", [pixels(6)], 4, labels=torch.arange(6) % 3, classes=["a", "b", "c"])
    some = SomeImages(whole, torch.tensor([4, 1]))
    assert len(some) == 2
    assert (some.size, some.classes, some.labels.tolist()) == (4, ["a", "b", "c"], [1, 1])
    for row, other in enumerate((4, 1)):
        assert torch.equal(some.read(row), whole.read(other))
        assert (some.key(row), some.stamp(row)) == (whole.key(other), whole.stamp(other))
    assert SomeImages(ArrayImages("set", [pixels(6)], 4), torch.tensor([0])).labels is None


def test_some_rows_are_read_together():
    class Together(ArrayImages):
        def read_into(self, pixels, rows):
            asked.append([*rows])
            pixels[:] = 7
            return {4: "broken"}

    asked, read = [], torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    some = SomeImages(Together("set", [pixels(6)], 4), torch.tensor([5, 4, 2, 0]))
    assert some.read_into(read, [3, 1, 2]) == {1: "broken"}
    assert asked == [[0, 4, 2]]
    assert (read == 7).all()

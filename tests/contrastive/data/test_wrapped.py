import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.arrays import ArrayImages
from contrastive.data.cache import CachedImages
from contrastive.data.clips import AllFrames, ClipSpec, DrawnClips
from contrastive.data.crops import CroppedImages
from contrastive.data.encoded import FileImages
from contrastive.data.images import Images
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from eval.identities import Covered


def pixels(n, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


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


class Described(Images):
    """Images of which everything that describes them differs from the default and from row to row."""

    size, thread_safe, white, has_originals = 4, False, 4095, True
    labels, classes = torch.tensor([1, 0, -1]), ["a", "b"]

    def __init__(self, epoch=0):
        self.epoch = epoch

    def __len__(self):
        return 3

    def in_epoch(self, epoch):
        return Described(epoch)

    def read(self, row):
        return torch.full((3, 4, 4), 10 * self.epoch + row, dtype=torch.uint8)

    def key(self, row):
        return f"key {row}"

    def stamp(self, row):
        return f"stamp {row}"

    def content(self, row):
        return f"content {row}"

    def version(self, row):
        return f"version {row}"

    def dimensions(self, row):
        return row, 7


def never(rows, epoch):
    raise AssertionError("describing an image draws nothing")


WRAPPERS = {
    "some": lambda source: SomeImages(source, torch.arange(3)),
    "crops": lambda source: CroppedImages(source, never, [4]),
    "cache": lambda source: CachedImages(source, Path("none"), {}),
    "clips": lambda source: DrawnClips(source, ClipSpec(2), never),
    "covered": lambda source: Covered(source, 0.25, 0),
}


@pytest.mark.parametrize("build", WRAPPERS.values(), ids=WRAPPERS)
def test_all_that_describes_an_image_is_that_of_the_set_it_is_made_of(build):
    source = Described()
    images = build(source)
    assert (len(images), images.size, images.classes, images.white) == (3, 4, ["a", "b"], 4095)
    assert images.labels.tolist() == [1, 0, -1]
    for row in range(3):
        assert (images.key(row), images.dimensions(row)) == (source.key(row), source.dimensions(row))
        for name in ("stamp", "content", "version"):
            assert getattr(images, name)(row).startswith(getattr(source, name)(row))
    images.white = 1023
    assert source.white == 1023
    # The whole images of the source have no part covered, and no crop: only a subset gives them.
    assert images.has_originals == isinstance(images, SomeImages)


def test_a_subset_of_what_differs_by_epoch_is_that_of_the_epoch():
    images = SomeImages(SomeImages(Described(), torch.tensor([2, 1])), torch.tensor([1]))
    assert [int(images.in_epoch(epoch).read(0)[0, 0, 0]) for epoch in (0, 4)] == [1, 41]
    assert images.in_epoch(4).labels.tolist() == [0]
    unchanging = SomeImages(ArrayImages("set", [pixels(2)], 4), torch.tensor([1]))
    assert unchanging.in_epoch(4) is unchanging


def test_a_subset_of_crops_is_read_as_the_crops_are():
    """Read flat rows of bytes, which have no axes of colour and place."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    crops = CroppedImages(
        ArrayImages("set", [pixels(3)], 4), lambda rows, epoch: [lambda h, w: boxes] * len(rows), [4, 2]
    )
    some = SomeImages(crops, torch.tensor([2, 0]))
    assert torch.equal(decode_all(some).images, torch.stack([crops.read(2), crops.read(0)]))


def test_frames_are_described_by_their_video():
    frames = AllFrames(Described())  # each image is a video of one frame
    assert [*map(frames.version, range(3))] == [f"version {row}" for row in range(3)]
    assert (frames.content(2), frames.dimensions(2), frames.white) == ("content 2", (2, 7), 4095)
    assert (frames.labels, frames.classes) == (None, None)

import pickle

import pytest

from contrastive.data.encoded import FileImages


def test_file_names_take_little_memory():
    """An ImageNet's worth of names: a list of str would take over 110 bytes each."""
    keys = [b"train/n%08d/n%08d_%d.JPEG" % (n % 1000, n % 1000, n) for n in range(50_000)]
    images = FileImages("/data", keys, 8)
    assert [images.key(row) for row in (0, 1, 49_999)] == [keys[row].decode() for row in (0, 1, 49_999)]
    assert len(pickle.dumps(images)) < 50 * len(keys)
    for row in (-1, 50_000):
        with pytest.raises(IndexError, match="there are 50000 images"):
            images.key(row)

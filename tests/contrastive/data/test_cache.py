"""Decoded once: the cache holds what the files hold, and nothing stale, torn or double."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.cache import cached
from contrastive.data.decode import Unreadable
from contrastive.data.encoded import FileImages
from contrastive.data.files import open_tree
from contrastive.data.loader import build_loader
from contrastive.data.plan import Plan


@pytest.fixture
def tree(write_image, tmp_path):
    """70 images, more than one block; rows 3 and 66 cannot be read."""
    for number in range(70):
        write_image(f"tree/{number:03}.png", number)
    for number in (3, 66):
        (tmp_path / f"tree/{number:03}.png").write_bytes(b"no image")
    return lambda size=8: open_tree(tmp_path / "tree", size)


def unread(monkeypatch):
    def read(self, row):
        raise AssertionError(f"row {row} is decoded again")

    monkeypatch.setattr(FileImages, "read", read)


def test_holds_what_the_files_hold_and_is_made_once(tree, tmp_path, monkeypatch):
    images = tree()
    cached(images, tmp_path / "cache")
    expected = [None if row in (3, 66) else images.read(row) for row in range(70)]
    unread(monkeypatch)
    again = cached(tree(), tmp_path / "cache")
    for row in range(70):
        if expected[row] is None:
            with pytest.raises(Unreadable, match="not an image of a known format"):
                again.read(row)
        else:
            assert torch.equal(again.read(row), expected[row])
    assert (len(again), again.key(5), again.fingerprint()) == (70, images.key(5), images.fingerprint())


@pytest.mark.parametrize(("resident", "workers"), [("true", 0), ("false", 0), ("false", 2)])
def test_batches_and_reports_are_those_without_it(tree, tmp_path, resident, workers):
    plan, found = Plan(70, seed=1, global_batch=16, epochs=2), []
    for cache in (None, str(tmp_path / "cache")):
        data = DataConfig(resident=resident, num_workers=workers, cache=cache, max_corrupt=0.5)
        told = {}
        loader = build_loader(tree(), plan, data, device=torch.device("cpu"), on_corrupt=told.__setitem__)
        found.append((list(loader), told))
    (plain, reasons), (mapped, reasons_mapped) = found
    assert reasons == reasons_mapped
    assert set(reasons) == {3, 66}
    for left, right in zip(plain, mapped, strict=True):
        assert torch.equal(left.ids, right.ids)
        assert torch.equal(left.images, right.images)


def test_what_an_interrupted_build_leaves_is_never_read(tree, tmp_path, monkeypatch):
    read = FileImages.read

    def interrupted(self, row):
        if row == 69:
            raise KeyboardInterrupt
        return read(self, row)

    monkeypatch.setattr(FileImages, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tree(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))
    monkeypatch.setattr(FileImages, "read", read)
    assert torch.equal(cached(tree(), tmp_path / "cache").read(69), tree().read(69))


def test_changed_files_and_sizes_get_an_array_of_their_own(tree, tmp_path):
    cached(tree(), tmp_path / "cache")
    victim = tmp_path / "tree/007.png"
    before, other = victim.stat(), (tmp_path / "tree/008.png").read_bytes()
    assert len(other) == before.st_size  # so that the size alone would not tell
    victim.write_bytes(other)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert (cached(tree(), tmp_path / "cache").read(7) == 8).all()
    assert cached(tree(4), tmp_path / "cache").read(7).shape == (3, 4, 4)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has the lock; elsewhere both decode")
def test_a_second_process_waits_for_the_first_and_takes_its_array(tree, tmp_path, monkeypatch):
    made = cached(tree(), tmp_path / "made")._path
    there = tmp_path / "cache" / made.name
    there.parent.mkdir()
    holding = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    arguments = [sys.executable, "-c", holding, str(there.with_suffix(".lock"))]
    unread(monkeypatch)
    found = []
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        waiting = threading.Thread(target=lambda: found.append(cached(tree(), there.parent)))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        for name in (made.with_suffix(".json"), made):
            shutil.copy(name, there.parent)
        holder.communicate(b"\n")
        waiting.join(30)
    assert (found[0].read(9) == 9).all()


def test_workers_are_handed_the_name_not_the_pixels(tree, tmp_path):
    images = cached(tree(), tmp_path / "cache")
    images.read(0)
    assert len(pickle.dumps(images)) < np.prod((70, 3, 8, 8))
    assert (pickle.loads(pickle.dumps(images)).read(9) == 9).all()


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*file.*another folder"):
        cached(tree(), tmp_path / "file")


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_what_is_damaged_is_decoded_again(tree, tmp_path, suffix):
    images = tree(4)
    expected = cached(images, tmp_path / "cache")
    pixels = np.array(expected._pixels)
    path = expected._path.with_suffix(suffix)
    whole = path.read_bytes()
    odd = {".npy": [], ".json": [b"[1, 2]", b"[]", b"3", b"null", b'{"a": "b"}', b"[" * 100_000]}
    for other in (
        pixels.astype(np.float32),
        pixels[1:],
        pixels[:, :1].repeat(3, 2),
        np.asfortranarray(pixels),
    ):
        file = io.BytesIO()
        np.save(file, other)
        odd[".npy"].append(file.getvalue())
    for damage in (b"", b"junk", b"\xff\xfe", whole[:-1], whole[:50], whole + b"0", *odd[suffix]):
        path.write_bytes(damage)
        again = cached(images, tmp_path / "cache")
        assert path.read_bytes() == whole, damage[:20]
        assert np.array_equal(again._pixels, pixels)
        assert again._unreadable.keys() == {3, 66}
    path.unlink()
    assert cached(images, tmp_path / "cache")._unreadable.keys() == {3, 66}
    assert path.read_bytes() == whole

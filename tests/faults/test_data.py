"""Check that unreadable files are skipped, counted and listed exactly, and that too many stop the run."""

import csv
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests import tiny


def _bomb(path):
    """Return a PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    whole = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)


def _link_to_nothing(path):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def _link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


def _flipped(path):
    data = bytearray(path.read_bytes())
    data[18] ^= 0x10  # of the width, so that the header's checksum is wrong
    path.write_bytes(data)


def _cut_jpeg(path):
    Image.open(path).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:300])


def _float_tiff(path):
    Image.fromarray(np.zeros((20, 24), np.float32)).save(path, "TIFF")


WAYS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "a web page": lambda path: path.write_text("<html>404 not found</html>"),
    "no pixels": lambda path: path.write_bytes(b"P5 0 0 255\n"),
    "enormous": _bomb,
    "flipped bit": _flipped,
    "cut JPEG": _cut_jpeg,
    "float TIFF": _float_tiff,
    "dangling link": _link_to_nothing,
}


@pytest.fixture
def damaged(lab):
    """Write 1,000 images and damage 100 of them in 10 ways; return the names of the damaged ones."""
    (lab.folder / "photos").rename(lab.folder / "other")
    tiny.write_images(lab.folder / "photos", 1000, size=(20, 24))
    names = {}
    for number, (way, damage) in enumerate(WAYS.items()):
        for place in range(10):
            path = lab.folder / "photos" / f"{100 * place + 7 * number}.png"
            damage(path)
            names[path.name] = way
    assert len(names) == 100
    lab.overrides = ["data.global_batch=100", "schedule.epochs=2", "logging.every_n_steps=5"]
    return names


def _without_index(path):
    path.write_bytes(path.read_bytes().replace(b"moov", b"gone"))


BROKEN_FILMS = {
    "empty": WAYS["empty"],
    "cut in half": WAYS["cut in half"],
    "header only": WAYS["header only"],
    "a web page": WAYS["a web page"],
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
    "without its index": _without_index,
    "sound alone": lambda path: tiny.write_video(path, 0, sound=True),
    "one frame": lambda path: tiny.write_video(path, 1),
    "a picture": lambda path: Image.new("RGB", (24, 20)).save(path, "PNG"),
    "a list of other files": lambda path: path.write_text("ffconcat version 1.0\nfile 1.mp4\n"),
    "dangling link": _link_to_nothing,
    "link to itself": _link_to_itself,
}


def test_broken_videos_are_named(films):
    broken = {f"{4 * number}.mp4": damage for number, damage in enumerate(BROKEN_FILMS.values())}
    for name, damage in broken.items():
        damage(films.folder / "photos" / name)
    ended = films.run("tolerant", "data.max_corrupt=0.25")
    assert ended.codes == [0], ended.err
    assert listed(films, "tolerant") == sorted(broken)
    ended = films.run("strict", "data.max_corrupt=0.24", "data.resident=false", "data.num_workers=0")
    assert ended.codes == [3]
    assert set(listed(films, "strict")) <= broken.keys()


def listed(lab, name):
    rows = list(csv.DictReader((lab.folder / "runs" / name / "corrupt.csv").read_text().splitlines()))
    assert all(row["reason"] for row in rows)
    return sorted(row["key"] for row in rows)


@pytest.mark.parametrize(
    "reading",
    [
        ["data.resident=true"],
        ["data.resident=false", "data.num_workers=0"],
        pytest.param(["data.resident=false", "data.num_workers=2"], marks=pytest.mark.faults),
    ],
    ids=["resident", "streamed", "workers"],
)
def test_corrupt_files_are_counted_and_listed_exactly(lab, damaged, reading):
    ended = lab.run("tolerant", *reading, "data.max_corrupt=0.1")
    assert ended.codes == [0], ended.err
    assert ended.result["finished"]
    assert listed(lab, "tolerant") == sorted(damaged)


def test_corrupt_files_above_the_threshold_stop_the_run(lab, damaged):
    """Exit code 3, as the README says: the input could be repaired, but the run stopped itself."""
    ended = lab.run("strict", "data.max_corrupt=0.099", "data.resident=false", "data.num_workers=0")
    assert ended.codes == [3]
    assert "could not be read, data.max_corrupt=0.099 allows 9.9%" in ended.err[0]
    assert not ended.result["finished"]
    assert set(listed(lab, "strict")) <= damaged.keys()


def test_corrupt_files_are_judged_by_all_ranks_together(lab, damaged):
    """No rank sees all files, yet one epoch distinguishes 10.0% from 9.9%; all ranks stop, none waits."""
    streamed = ["data.resident=false", "data.num_workers=0"]
    ended = lab.run("strict", *streamed, "data.max_corrupt=0.099", ranks=2)
    assert ended.codes == [3, 3], ended.err
    assert all("could not be read, data.max_corrupt=0.099 allows 9.9%" in err for err in ended.err)
    assert ended.result["steps"] < 10
    ended = lab.run("tolerant", *streamed, "data.max_corrupt=0.1", "trainer.max_steps=10", ranks=2)
    assert ended.codes == [0, 0], ended.err
    assert listed(lab, "tolerant") == sorted(damaged)


def test_file_that_vanishes_while_training_is_skipped_and_listed(lab):
    """A file is deleted in the first epoch and missing in the second."""
    gone = lab.folder / "photos" / "7.png"
    streamed = ["data.resident=false", "data.num_workers=0", "data.max_corrupt=0.1"]
    ended = lab.run("vanishing", *streamed, faults=[["remove_at", 6, str(gone)]])
    assert ended.codes == [0], ended.err
    assert not gone.exists()
    assert listed(lab, "vanishing") == ["7.png"]
    rows = (lab.folder / "runs" / "vanishing" / "corrupt.csv").read_text()
    assert "No such file or directory" in rows

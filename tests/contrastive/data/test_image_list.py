import csv
import os

import pytest

from contrastive.config import UserError
from contrastive.data.files import open_tree
from contrastive.data.image_list import describe_changes, read_image_list, write_image_list


@pytest.fixture
def folder(tmp_path, write_image):
    for name in ('images/a "quoted", name.png', "images/b\nc.png", "images/ü.png", "images/z.png"):
        write_image(name, 3)
    return tmp_path / "images"


def test_written_and_read_back(folder, tmp_path):
    images = open_tree(folder, 8)
    path = tmp_path / "manifest.csv"
    written = write_image_list(path, images)
    manifest = read_image_list(path)
    assert manifest.keys == [images.key(row) for row in range(4)]
    assert manifest.sizes == [str(os.stat(images.path(row)).st_size) for row in range(4)]
    assert written == manifest.fingerprint() == images.fingerprint()
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["0", "1", "2", "3"]
    assert describe_changes(manifest, images) == ""


def test_changes_are_named(folder, tmp_path, write_image):
    path = tmp_path / "manifest.csv"
    before = write_image_list(path, open_tree(folder, 8))
    (folder / "ü.png").unlink()
    (folder / "z.png").write_bytes(b"another size")
    for number in range(5):
        write_image(f"images/new{number}.png")
    images = open_tree(folder, 8)
    assert images.fingerprint() != before
    said = describe_changes(read_image_list(path), images)
    assert said == "5 added (new0.png, new1.png, new2.png, ...), 1 removed (ü.png), 1 altered (z.png)"


def test_a_new_order_is_a_change(folder, tmp_path):
    path = tmp_path / "manifest.csv"
    images = open_tree(folder, 8)
    write_image_list(path, images)
    manifest = read_image_list(path)
    manifest.keys.reverse()
    manifest.sizes.reverse()
    assert describe_changes(manifest, images) == "the same images in another order"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"row,key\n0,a\n",
        b"row,key,size\n0,a,1\n2,b,1\n",
        b"row,key,size\n0,a\n",
        b"\xff\xfe\x00",
        b"row,key,size\n0,\0,1",
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.csv"
    path.write_bytes(content)
    if content.endswith(b"\0,1"):  # a legal csv cell
        return
    with pytest.raises(UserError, match=r"manifest.csv: not a .*manifest.*restore it"):
        read_image_list(path)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a readable manifest"):
        read_image_list(tmp_path / "manifest.csv")

import hashlib
import io
import os
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import DataConfig, HfConfig, UserError
from contrastive.data.hf import open_hf
from contrastive.data.shards.images import open_shards
from contrastive.shards import main


def encoded(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), 20 * number, dtype=np.uint8)).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def table(numbers, **columns):
    kinds = {"image": datasets.Image()}
    if "label" in columns:
        kinds["label"] = datasets.ClassLabel(names=["cat", "dog"])
    rows = {"image": [None if number is None else encoded(number) for number in numbers], **columns}
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def opened(root, **columns):
    return open_hf(DataConfig("hf", str(root), image_size=9, download=False, hf=HfConfig(**columns)))


@pytest.fixture
def saved(tmp_path):
    parts = {"train": table(range(6), label=[0, 1] * 3), "test": table([7, 8], label=[1, 0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_images_labels_and_parts_are_those_of_the_table(saved):
    train, test = opened(saved).labelled_parts("hf")
    assert [int(train.read(row)[0, 0, 0]) for row in range(6)] == [0, 20, 40, 60, 80, 100]
    pixels = torch.zeros(3, 3, 9, 9, dtype=torch.uint8)
    assert train.read_into(pixels, [5, 0, 3]) == {}
    assert pixels[:, 0, 0, 0].tolist() == [100, 0, 60]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1] * 3, [1, 0])
    assert train.classes == ["cat", "dog"]
    assert [test.key(row) for row in range(2)] == ["test/0", "test/1"]
    assert train.stamp(3) == str(len(encoded(3)["bytes"]))
    assert train.dimensions(0) == (9, 9)


def test_a_table_becomes_shards(saved, tmp_path):
    out = tmp_path / "shards"
    assert main(["pack", str(saved), str(out), "data.name=hf", "data.image_size=9"]) == 0
    parts = opened(saved).labelled_parts("hf")
    packed = open_shards(DataConfig("shards", str(out), image_size=9)).labelled_parts("shards")
    for part, shards in zip(parts, packed, strict=True):
        keys = [shards.key(row) for row in range(len(shards))]
        assert all(key.endswith(".png") for key in keys)
        rows = [int(key.split("/")[-1].removesuffix(".png")) for key in keys]
        assert sorted(rows) == list(range(len(part)))
        for place, row in enumerate(rows):
            assert torch.equal(shards.read(place), part.read(row))
            assert shards.labels[place] == part.labels[row]


def test_formats_that_folders_are_not_searched_for_become_png(tmp_path):
    rows = {"image": [encoded(number, "DDS") for number in range(3)]}
    datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()})).save_to_disk(
        tmp_path / "s"
    )
    asked = ["pack", str(tmp_path / "s"), str(tmp_path / "out"), "data.name=hf", "shuffle=false"]
    assert main([*asked, "data.image_size=9"]) == 0
    packed = open_shards(DataConfig("shards", str(tmp_path / "out"), image_size=9)).train
    assert [packed.key(row).endswith(".png") for row in range(3)] == [True] * 3
    assert [int(packed.read(row)[0, 0, 0]) for row in range(3)] == [0, 20, 40]


def test_a_selection_without_labels_has_its_own_rows(tmp_path):
    table(range(6)).select([4, 2]).save_to_disk(tmp_path / "set")
    data = opened(tmp_path / "set")
    assert (data.labelled, data.test) == (None, None)
    assert [int(data.train.read(row)[0, 0, 0]) for row in range(2)] == [80, 40]
    assert data.train.stamp(1) == str(len(encoded(2)["bytes"]))


def test_an_empty_row_is_unreadable_and_no_other(tmp_path):
    table([1, None, 3]).save_to_disk(tmp_path / "set")
    images = opened(tmp_path / "set").train
    pixels = torch.zeros(3, 3, 9, 9, dtype=torch.uint8)
    assert images.read_into(pixels, range(3)) == {1: "no image in this row"}
    assert pixels[:, 0, 0, 0].tolist() == [20, 0, 60]
    assert images.stamp(1) == "unreadable"


@pytest.mark.parametrize("image", [None, "file"])
def test_paths_of_files_are_read_from_the_folder_of_the_table(tmp_path, monkeypatch, image):
    """A table of strings alone; one of the files is missing, and one is named by its whole path."""
    files = ["pictures/1.png", "pictures/2.png", "gone.png", str(tmp_path / "3.PNG")]
    rows = {"file": files, "taken by": ["me"] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "pictures").mkdir()
    for number, path in ((1, "set/pictures/1.png"), (2, "set/pictures/2.png"), (3, "3.PNG")):
        (tmp_path / path).write_bytes(encoded(number)["bytes"])
    images = opened(tmp_path / "set", image=image, label="label").train
    pixels = torch.zeros(4, 3, 9, 9, dtype=torch.uint8)
    assert images.read_into(pixels, range(4)) == {
        2: f"{tmp_path / 'set' / 'gone.png'}: No such file or directory"
    }
    assert pixels[:, 0, 0, 0].tolist() == [20, 40, 0, 60]
    sizes = [str(len(encoded(number)["bytes"])) for number in (1, 2, 3)]
    assert [images.stamp(row) for row in range(4)] == [*sizes[:2], "unreadable", sizes[2]]
    assert images.content(0) == hashlib.sha256(encoded(1)["bytes"]).hexdigest()[:16]
    before = [images.version(row) for row in range(4)]
    os.utime(tmp_path / "set" / "pictures" / "2.png", ns=(0, 0))  # written again
    assert [images.version(row) != old for row, old in enumerate(before)] == [False, True, False, False]


def test_a_table_with_two_columns_of_paths_asks_for_one(tmp_path):
    rows = {"left": ["a.png"], "right": ["b.jpg"], "word": ["png"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"or several \(left \(Value\), .*name one with data.hf.image"):
        opened(tmp_path / "set")


def test_an_altered_image_changes_what_a_resume_compares(tmp_path):
    for name, number in (("a", 1), ("b", 2)):
        table([0, number]).save_to_disk(tmp_path / name)
    a, b = (opened(tmp_path / name).train for name in "ab")
    assert a.content(0) == b.content(0)
    assert a.content(1) != b.content(1)
    assert a.revision() != b.revision()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "photo"}, r"hf\.image=photo: split train has image \(Image\)"),
        ({"label": "kind"}, "hf.label=kind"),
        (
            {"image": "label"},
            r"hf\.image=label: this column holds no images; split train has image \(Image\)",
        ),
        ({"label": "image"}, r"hf\.label=image: this column holds no class numbers"),
    ],
)
def test_a_column_that_is_unknown_or_of_another_type_is_refused_with_those_there(saved, columns, message):
    with pytest.raises(UserError, match=message):
        opened(saved, **columns)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="no data set that datasets can load"):
        opened(tmp_path)


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'contrastive-pretrain\[hf\]'"):
        opened(tmp_path)

"""CIFAR, STL-10 and ImageNet in miniature: files of the published layout, read by torchvision itself."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import open_dataset


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five training batches of 2 and a test batch of 3; pixel values tell the row."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    lists = {"train_list": [], "test_list": []}
    for part, names in (
        ("train_list", [f"data_batch_{n}" for n in range(1, 6)]),
        ("test_list", ["test_batch"]),
    ):
        for number, name in enumerate(names):
            n = 3 if part == "test_list" else 2
            rows = np.arange(number * n, (number + 1) * n, dtype=np.uint8)
            # Stored as 1024 reds, greens, blues, row by row.
            data = rows[:, None] + np.repeat(np.array([0, 50, 100], dtype=np.uint8), 1024)
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": (rows % 10).tolist()}))
            lists[part].append([name, md5(folder / name)])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    for part, entries in lists.items():
        monkeypatch.setattr(datasets.CIFAR10, part, entries)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return DataConfig(name="cifar10", root=str(tmp_path), image_size=32, download=False)


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    counts = {"train": 3, "unlabeled": 4, "test": 2}
    for part, n in counts.items():
        # Column-major planes: value = 10 * number + plane, the first column brighter by 100.
        data = np.zeros((n, 3, 96, 96), dtype=np.uint8)
        data += (10 * np.arange(n, dtype=np.uint8))[:, None, None, None] + np.arange(3, dtype=np.uint8)[
            :, None, None
        ]
        data[:, :, 0, :] += 100
        data.tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    files = {part: [[f"{part}_X.bin", md5(folder / f"{part}_X.bin")]] for part in counts}
    for part in ("train", "test"):
        files[part].append([f"{part}_y.bin", md5(folder / f"{part}_y.bin")])
    monkeypatch.setattr(datasets.STL10, "train_list", files["train"] + files["unlabeled"])
    monkeypatch.setattr(datasets.STL10, "test_list", files["test"])
    return DataConfig(name="stl10", root=str(tmp_path), image_size=96, decode_size=96, download=False)


def packed(path, files):
    """A tar of ``files``, name to bytes; returns its bytes."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The three archives of two classes: a tar of tars, a flat tar, and who is who in MATLAB's format."""
    from scipy.io import savemat

    wnids = ["n02", "n01"]
    grey = {}
    for value in (10, 20, 30, 40, 50):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (value, value, value)).save(stream, "png")
        grey[value] = stream.getvalue()
    parts = {
        wnid: packed(tmp_path / "part.tar", {f"{wnid}_{value}.JPEG": grey[value] for value in values})
        for wnid, values in {"n01": (10, 20), "n02": (30,)}.items()
    }
    (tmp_path / "part.tar").unlink()
    synsets = [(number, wnid, f"name of {wnid}", "gloss", 0) for number, wnid in enumerate(wnids, 1)]
    fields = [("ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, dtype=fields)})
    contents = {
        "train": ("ILSVRC2012_img_train.tar", {f"{wnid}.tar": tar for wnid, tar in parts.items()}),
        "val": ("ILSVRC2012_img_val.tar", {"val_1.JPEG": grey[40], "val_2.JPEG": grey[50]}),
        "devkit": (
            "ILSVRC2012_devkit_t12.tar.gz",
            {
                "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
                "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n",
            },
        ),
    }
    known = {}
    for part, (name, files) in contents.items():
        packed(tmp_path / name, files)
        known[part] = (name, md5(tmp_path / name))
    monkeypatch.setattr(datasets.imagenet, "ARCHIVE_META", known)
    return DataConfig(name="imagenet", root=str(tmp_path), image_size=8)


def test_imagenet_archives_are_unpacked_once(imagenet, tmp_path):
    (tmp_path / ".train.partial" / "n09").mkdir(parents=True)  # of an unpacking that was killed
    dataset = open_dataset(imagenet)
    train, test, by_hash = dataset.labelled, dataset.test, dataset.held_out_by_hash
    assert ([train.key(row) for row in range(3)], by_hash) == (
        ["train/n01/n01_10.JPEG", "train/n01/n01_20.JPEG", "train/n02/n02_30.JPEG"],
        False,
    )
    assert [test.key(row) for row in range(2)] == ["val/n01/val_2.JPEG", "val/n02/val_1.JPEG"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert [int(train.read(row)[0, 0, 0]) for row in range(3)] == [10, 20, 30]
    for archive in tmp_path.glob("ILSVRC2012*"):
        archive.unlink()
    assert open_dataset(imagenet).train.fingerprint() == train.fingerprint()


def test_imagenet_that_is_not_there_or_damaged_is_explained(imagenet, tmp_path):
    archive = tmp_path / "ILSVRC2012_img_val.tar"
    archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(UserError, match=r"img_val\.tar is not present .* or is corrupted.*set data\.root"):
        open_dataset(imagenet)
    assert not (tmp_path / "val").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train/ and val/ .*ILSVRC2012_img_train\.tar"):
        open_dataset(DataConfig(name="imagenet", root=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"nowhere: no such folder; set data\.root"):
        open_dataset(DataConfig(name="imagenet", root=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


def test_cifar10(cifar10):
    dataset = open_dataset(cifar10)
    train, test = dataset.train, dataset.test
    assert dataset.labelled is train
    assert (len(train), len(test), dataset.held_out_by_hash) == (10, 3, False)
    assert train.classes[3] == "class 3"
    assert train.labels.tolist() == list(range(10))
    assert [train.key(0), test.key(2)] == ["cifar10/train/0", "cifar10/test/2"]
    for row in range(10):
        wanted = torch.tensor([row, row + 50, row + 100], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
        assert torch.equal(train.read(row), wanted)


def test_cifar100_is_asked_of_torchvision(monkeypatch, tmp_path):
    asked = []

    class Fake:
        def __init__(self, root, train, download):
            asked.append((root, train, download))
            self.data = np.full((4 if train else 2, 32, 32, 3), 9, dtype=np.uint8)
            self.targets, self.classes = [99] * len(self.data), [str(n) for n in range(100)]

    monkeypatch.setattr(datasets, "CIFAR100", Fake)
    dataset = open_dataset(DataConfig(name="cifar100", root=str(tmp_path), download=True))
    train, test = dataset.train, dataset.test
    assert (len(train), len(test), train.key(0)) == (4, 2, "cifar100/train/0")
    assert asked == [(str(tmp_path), True, False), (str(tmp_path), False, False)]


def test_stl10(stl10):
    dataset = open_dataset(stl10)
    train, test = dataset.labelled, dataset.test
    assert (len(train), len(test)) == (3, 2)
    assert train.labels.tolist() == [0, 1, 2]
    image = test.read(1)
    assert image[:, 5, 5].tolist() == [10, 11, 12]
    assert image[:, 5, 0].tolist() == [110, 111, 112]  # the bright column stands upright
    pretraining = dataset.train
    assert len(pretraining) == 7
    assert pretraining.labels.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert [int(pretraining.read(row)[0, 9, 9]) for row in range(7)] == [0, 10, 20, 0, 10, 20, 30]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_files_are_explained_without_a_download(tmp_path, name):
    with pytest.raises(
        UserError, match=r"not found or damaged, and data.download=false; set data.download=true"
    ):
        open_dataset(DataConfig(name=name, root=str(tmp_path), download=False))


def test_damaged_files_are_refused(cifar10, tmp_path):
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="not found or damaged"):
        open_dataset(cifar10)


def test_one_process_downloads_and_a_failure_is_explained(tmp_path, monkeypatch, capfd):
    class Fake:
        def __init__(self, root, train, download):
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            print("Downloading")
            held = (tmp_path / "new" / ".download.lock").exists()
            raise OSError(f"unreachable, lock held: {held}")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    data = DataConfig(name="cifar10", root=str(tmp_path / "new"), download=True)
    with pytest.raises(
        UserError, match=r"download failed \(unreachable, lock held: True\).*data.name=digits"
    ):
        open_dataset(data)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Downloading" in err

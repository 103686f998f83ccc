"""Shard sets: packed, indexed, read, damaged, and trained on."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import DataConfig, RemoteConfig, UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.dataset import open_dataset
from contrastive.data.decode import SourceLost, Unreadable
from contrastive.data.files import open_imagefolder, open_tree
from contrastive.data.reading import decode_all
from contrastive.data.shards.index import SET_FILE, read_set, scan
from contrastive.data.shards.pack import check_set, index_shards, pack
from contrastive.data.shards.ranges import Ranges, Span
from contrastive.data.wrapped import SomeImages
from contrastive.shards import main
from tests import tiny


def by_member(images):
    """Return the pixels of every image by its path."""
    return {images.key(row).partition("/")[2]: images.read(row) for row in range(len(images))}


def assert_same_images(found, source):
    """Compare images by their paths."""
    wanted = {source.key(row): source.read(row) for row in range(len(source))}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def ranges():
    return Ranges(RemoteConfig(retry_s=0.0))


def test_packed_images_are_the_source_in_another_order_wherever_they_lie(packed, open_set, serve):
    root, source = packed
    local, remote = open_set(root).train, open_set(serve(root).url).train
    assert_same_images(by_member(local), source)
    assert len(list(root.glob("*.tar"))) > 1
    assert [local.key(row) for row in range(24)] == [remote.key(row) for row in range(24)]
    assert local.fingerprint() == remote.fingerprint()
    assert [key.partition("/")[2] for key in map(local.key, range(24))] != list(map(source.key, range(24)))
    pixels = torch.zeros(24, 3, 12, 12, dtype=torch.uint8)
    assert remote.read_into(pixels, range(24)) == {}
    assert all(torch.equal(pixels[row], local.read(row)) for row in range(24))
    assert remote.dimensions(3) == (12, 12)
    assert local.labels is None


def test_images_in_shards_have_the_white_of_the_settings(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(2):
        Image.fromarray(np.full((12, 12), 4095, np.uint16)).save(tmp_path / "deep" / f"{number}.png")
    pack(open_tree(tmp_path / "deep", 12), tmp_path / "shards", shard_bytes=14_000, shuffle=False)
    data = DataConfig(name="shards", root=str(tmp_path / "shards"), image_size=12, white=4095)
    images = open_dataset(data).train
    pixels = torch.zeros(2, *images.shape, dtype=torch.uint8)
    assert images.read_into(pixels, [0, 1]) == {}
    assert pixels.unique().tolist() == [255]


def test_packing_twice_gives_the_same_bytes(packed, photos, tmp_path):
    pack(open_tree(photos, 12), tmp_path / "again", shard_bytes=14_000, shuffle=True)
    for path in packed[0].iterdir():
        if path.suffix != ".npz":  # a zip file has the time of writing
            assert (
                path.suffix == ".json" or path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
            )


@pytest.mark.parametrize(
    "names",
    [
        "x.y.png x_y-2.png x_y.png z.png",  # x_y-2 is the name of a file, and that of x_y.png in row 2
        "a-2.png a-3.png a.bmp a.png b.png",
        "a.b.png a_b-3-2.png a_b-3.png a_b.png",
    ],
)
def test_images_of_any_names_are_packed_under_keys_of_their_own(names, tmp_path, open_set):
    for number, name in enumerate(sorted(names.split())):
        Image.new("RGB", (12, 12), (40 * number,) * 3).save(tmp_path / name)
    source = open_tree(tmp_path, 12)
    out = pack(source, tmp_path / "set", shard_bytes=10**6, shuffle=False)
    found = open_set(tmp_path / "set").train
    assert [int(found.read(row)[0, 0, 0]) for row in range(len(found))] == [*range(0, 40 * len(source), 40)]
    assert check_set(ranges(), str(tmp_path / "set"), out) == {}


def test_check_names_images_that_have_the_key_of_another(tmp_path):
    first, other = tiny.write_images(tmp_path / "photos", 2, size=(12, 12))
    with tarfile.open(tmp_path / "0.tar", "w") as made:
        for path, name in ((first, "f.x/a.png"), (other, "f.x/b.png"), (other, "f.x/a.left.png")):
            made.add(path, name)
    found = index_shards(ranges(), [str(tmp_path / "0.tar")], tmp_path)
    problems = check_set(ranges(), str(tmp_path), found)
    assert problems == {"0.tar/f.x/a.left.png": "has the key of a sample before it"}


def test_shards_of_an_interrupted_run_are_not_mixed_with_new_ones(photos, tmp_path):
    (tmp_path / "shard-000003.tar").touch()
    with pytest.raises(UserError, match="of an interrupted run"):
        pack(open_tree(photos, 12), tmp_path, shard_bytes=14_000, shuffle=True)


def test_a_folder_that_cannot_be_written_is_explained(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot be written \(Not a directory\); choose a folder that can be"
    ):
        pack(open_tree(photos, 12), tmp_path / "file" / "set", shard_bytes=14_000, shuffle=True)


def test_a_part_whose_list_was_lost_needs_the_names_of_the_other(tmp_path, open_set):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    images = ArrayImages("x", [pixels], 8, labels=torch.tensor([0, 1, 0, 1]), classes=["cat", "dog"])
    for part in ("train", "test"):
        pack(images, tmp_path / part, shard_bytes=10**6, shuffle=False)
    whole, lost = (tmp_path / part / SET_FILE for part in ("test", "train"))
    lost.unlink()
    index_shards(ranges(), [str(tar) for tar in lost.parent.glob("*.tar")], lost.parent)
    with pytest.raises(UserError, match=r"copy the classes of the other into it"):
        open_set(tmp_path)
    lost.write_text(
        json.dumps(json.loads(lost.read_text()) | {"classes": json.loads(whole.read_text())["classes"]})
    )
    assert open_set(tmp_path).train.classes == ["cat", "dog"]


def test_indexing_again_keeps_the_names_of_the_classes(tmp_path):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    images = ArrayImages("x", [pixels], 8, labels=torch.tensor([0, 1, 0, 1]), classes=["cat", "dog"])
    pack(images, tmp_path, shard_bytes=10**6, shuffle=False)
    (tar,) = tmp_path.glob("*.tar")
    again = index_shards(Ranges(RemoteConfig()), [str(tar)], tmp_path)
    assert again.classes == ["cat", "dog"]
    assert read_set(Ranges(RemoteConfig()), str(tmp_path)) == again


def test_a_batch_of_neighbours_is_one_request(packed, open_set, serve):
    server = serve(packed[0])
    images = open_set(server.url).train
    before = len(server.requests)
    list(images.open_many([2, 0, 1, 3]))
    assert len(server.requests) == before + 1


def test_command_packs_class_folders_with_their_parts_labels_and_names(tmp_path, open_set, capsys):
    for part, count in (("train", 3), ("val", 2)):
        for channel, name in enumerate(("cat", "dog")):
            tiny.write_images(tmp_path / "photos" / part / name, count, size=(12, 12), channel=channel)
    out = tmp_path / "set"
    assert main(["pack", str(tmp_path / "photos"), str(out), "data.name=imagefolder"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = {"samples": {"train": 6, "test": 4}, "shards": {"train": 1, "test": 1}}
    assert said == {"root": str(out), **counts, "left_out": {"train": 0, "test": 0}}
    train, test = open_set(out).labelled_parts("shards")
    assert train.classes == test.classes == ["cat", "dog"]
    for part in (train, test):
        named = [part.classes[label] for label in part.labels.tolist()]
        assert named == [part.key(row).split("/")[-2] for row in range(len(part))]
    assert main(["check", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == {"root": str(out), "samples": 10, "shards": 2, "damaged": 0}
    for part in ("train", "val"):
        tiny.write_images(tmp_path / "loose" / part, 3, size=(12, 12))
    mixed = ["pack", str(tmp_path / "loose"), str(out)]
    assert main(mixed) == 2
    assert "train and val are parts of one data set, and would be mixed; add data" in capsys.readouterr().err
    assert main([*mixed, "data.name=images"]) == 0  # beside train/ and test/
    assert main([*mixed, "data.name=images"]) == 2


def test_command_packs_a_folder_as_own_would_read_it_and_says_what_it_packed(tmp_path, open_set, capsys):
    tiny.write_classes(tmp_path / "photos", 20, names=("cat", "dog", "hen"), size=(12, 12))
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "set")]) == 0
    out, err = capsys.readouterr()
    counts = json.loads(out)["samples"]
    assert counts["train"] + counts["test"] == 60
    assert "data.name=imagefolder, as 3 class folders; one image in five is held out" in err
    assert f"set: 60 samples of 3 classes, {counts['test']} of them in the test part" in err
    assert len(open_set(tmp_path / "set").labelled_parts("shards")[1]) == counts["test"] > 0
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "bare"), "data.name=images"]) == 0
    assert "bare: 60 samples without labels\n" in capsys.readouterr().err


def test_files_that_training_could_not_read_are_named_counted_and_left_out(tmp_path, open_set, capsys):
    whole, cut, *_ = tiny.write_images(tmp_path / "photos", 6, size=(12, 12))
    cut.write_bytes(whole.read_bytes()[:-40])  # its header is in order
    (tmp_path / "photos" / "text.png").write_text("no image")
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "set"), "data.name=images"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["samples"], said["left_out"]) == ({"train": 5}, {"train": 2})
    images = open_tree(tmp_path / "photos", 12)
    reasons = decode_all(images).bad
    assert len(reasons) == 2
    for row, reason in reasons.items():
        assert f"{images.key(row)}: left out: {reason}\n" in err
    assert "set: 5 samples without labels; 2 more cannot be read and were left out, see above\n" in err
    assert decode_all(open_set(tmp_path / "set").train).bad == {}


def test_a_part_that_was_split_by_hash_names_the_set(tmp_path, open_set):
    for channel, name in enumerate(("cat", "dog")):
        tiny.write_images(tmp_path / "photos" / name, 12, size=(12, 12), channel=channel)
    out = tmp_path / "set"
    assert main(["pack", str(tmp_path / "photos"), str(out), "data.name=imagefolder"]) == 0
    assert open_set(out).held_out_by_hash
    for part in ("train", "test"):
        with pytest.raises(UserError, match=rf"split by this hash: use data\.root={re.escape(str(out))}$"):
            open_set(out / part)
    shutil.copytree(out / "train", tmp_path / "alone")
    with pytest.raises(UserError, match=r"or pack them as train and test$"):
        open_set(tmp_path / "alone")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["pack", "data.root=s3://bucket/photos", "OUT"],
            "machine, and s3://bucket/photos is a URL; copy the images here",
        ),
        (["pack", "https://host/photos", "OUT"], "https://host/photos is a URL; copy the images here"),
        (["pack", "OUT", "s3://bucket/set"], "written to a folder of this machine, and s3://bucket/set is a"),
        (["index", "OUT"], "OUT: no .tar file in it; index each of its folders that has some: OUT/train"),
        (["index", "OUT/none"], "OUT/none: no .tar file in it; give one that has"),
        (
            ["index", "s3://bucket/set", "out=OUT"],
            "folders behind a URL are not listed; give the URL of each",
        ),
    ],
)
def test_places_that_a_command_cannot_read_are_refused(tmp_path, capsys, arguments, words):
    (tmp_path / "none").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").touch()
    assert main([text.replace("OUT", str(tmp_path)) for text in arguments]) == 2
    assert words.replace("OUT", str(tmp_path)) in capsys.readouterr().err


def test_arrays_and_subsets_are_packed_with_their_labels(tmp_path, open_set):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    labels = torch.arange(30) % 3 - 1
    whole = ArrayImages("set", [pixels], 12, labels=labels, classes=["a", "b"])
    some = SomeImages(whole, torch.arange(29, -1, -1))
    pack(some, tmp_path / "set", shard_bytes=10**6, shuffle=True)
    data = open_set(tmp_path / "set")
    assert data.held_out_by_hash
    assert len(data.train) + len(data.test) == 30
    for part in (data.train, data.test):
        for row in range(len(part)):
            number = int(part.key(row).split("/")[-1].removesuffix(".png"))
            assert np.array_equal(part.read(row).permute(1, 2, 0).numpy(), pixels[number])
            assert part.labels[row] == labels[number]


def test_names_that_are_no_keys_keep_their_path_beside_them(tmp_path, open_set):
    photos = tmp_path / "photos"
    paths = tiny.write_images(photos, 3, size=(12, 12))
    for path, name in zip(paths, ("a.b.png", "a.c.png", "a_b.png"), strict=True):
        path.rename(photos / name)
    pack(open_tree(photos, 12), tmp_path / "set", shard_bytes=10**6, shuffle=False)
    images = open_set(tmp_path / "set").train
    assert len({images.key(row) for row in range(3)}) == 3
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as tar:
        found = [
            json.load(tar.extractfile(name))["path"] for name in tar.getnames() if name.endswith(".json")
        ]
    assert sorted(found)[:2] == ["a.b.png", "a.c.png"]


def test_shards_of_the_webdataset_package_have_the_same_index(tmp_path, photos):
    """Offsets differ, since the package writes times as longer headers; the bytes there are the same."""
    from webdataset import ShardWriter

    source = open_imagefolder(DataConfig("imagefolder", str(photos), image_size=12)).train
    pack(source, tmp_path / "ours", shard_bytes=10**6, shuffle=False)
    (tmp_path / "theirs").mkdir()
    with ShardWriter(str(tmp_path / "theirs" / "%d.tar"), verbose=0) as writer:
        for row in range(len(source)):
            key, data = source.key(row).removesuffix(".png"), Path(os.fsdecode(source.path(row))).read_bytes()
            writer.write({"__key__": key, "png": data, "cls": int(source.labels[row])})
    index_shards(ranges(), [str(tmp_path / "theirs" / "0.tar")], tmp_path / "theirs")
    paths = tmp_path / "ours" / "shard-000000.tar", tmp_path / "theirs" / "0.tar"
    own, other = (scan(io.BytesIO(path.read_bytes()), path.name) for path in paths)
    assert [own.names[row] for row in range(len(own))] == [other.names[row] for row in range(len(other))]
    for field in ("sizes", "hashes", "labels"):
        assert (getattr(own, field) == getattr(other, field)).all()
    assert {*own.labels} == {0, 1}
    assert check_set(ranges(), str(tmp_path / "theirs"), read_set(ranges(), str(tmp_path / "theirs"))) == {}


def tar_of(**members):
    """Return a tar file in memory; the names have ``__`` for dots."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_samples_are_grouped_as_webdataset_does():
    data = tar_of(
        a__JPG=b"1",
        a__cls=b"3",
        b__txt=b"",
        c__cls=b" 7\n",
        c__seg__png=b"22",
        c__jpg=b"333",
        README=b"",
        d__png=b"4",
    )
    index = scan(io.BytesIO(data), "x.tar")
    assert [index.names[row] for row in range(3)] == [b"a.JPG", b"c.seg.png", b"d.png"]
    assert index.labels.tolist() == [3, 7, -1]
    assert [data[at : at + size] for at, size in zip(index.offsets, index.sizes, strict=True)] == [
        b"1",
        b"22",
        b"4",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_of(a__txt=b""), "no sample with an image"),
        (tar_of(a__png=b"1", a__cls=b"cat"), r"a\.cls holds b'cat'; a class number below"),
        (tar_of(a__png=b"1", a__cls=b"9" * 30), "a class number below 100000 is needed"),
        (tar_of(a__png=bytes(5000))[:3000], "not a whole, uncompressed tar"),
        (b"no tar at all" * 100, "not a whole, uncompressed tar"),
    ],
    ids=["no image", "label", "id as label", "cut", "no tar"],
)
def test_what_cannot_be_indexed_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        scan(io.BytesIO(data), "x.tar")


def shard(root, number=0):
    return sorted(root.glob("*.tar"))[number]


def alter(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": (lambda path: path.unlink(), r"1 of \d shards are missing \(shard-000000.tar\)"),
    "renamed": (lambda path: path.rename(path.with_name("x.tar")), r"missing .*and x.tar not in the list"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-600]), r"when it was indexed; restore"),
    "index missing": (lambda path: Path(f"{path}.npz").unlink(), r"shard-000000.tar.npz: no such index"),
    "index altered": (lambda path: alter(Path(f"{path}.npz"), 300), r"shard-000000.tar.npz: damaged"),
    "list damaged": (lambda path: path.with_name(SET_FILE).write_text("{}"), r"shards.json: damaged"),
    "list missing": (
        lambda path: path.with_name(SET_FILE).unlink(),
        r"no shards.json in it, nor in its train",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_set_that_is_not_what_was_indexed_is_refused(packed, open_set, damage):
    act, message = DAMAGES[damage]
    act(shard(packed[0]))
    with pytest.raises(UserError, match=message):
        open_set(packed[0])


def test_altered_bytes_make_that_sample_unreadable_and_no_other(packed, open_set, serve, capsys):
    root, _ = packed
    images = open_set(root).train
    start = int(images._index.offsets[1])
    alter(shard(root), start + 40)
    for found in (images, open_set(serve(root).url).train):
        with pytest.raises(Unreadable, match="differs from its hash in the index"):
            found.read(1)
        pixels = torch.zeros(24, 3, 12, 12, dtype=torch.uint8)
        assert found.read_into(pixels, range(24)).keys() == {1}
    assert main(["check", str(root)]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["damaged"] == 1
    assert f"{images.key(1)}: differs" in said.err
    shard(root).unlink()
    assert list(check_set(ranges(), str(root), read_set(ranges(), str(root)))) == [shard_name(images)]


def shard_name(images):
    return images.key(0).partition("/")[0]


def test_a_member_that_is_no_image_is_unreadable_like_any_file(tmp_path, open_set):
    paths = tiny.write_images(tmp_path / "photos", 3, size=(12, 12))
    paths[1].write_bytes(b"not an image")
    tar = tmp_path / "0.tar"
    with tarfile.open(tar, "w") as made:
        for path in paths:
            made.add(path, path.name)
    index_shards(ranges(), [str(tar)], tmp_path)
    images = open_set(tmp_path).train
    pixels = torch.zeros(3, 3, 12, 12, dtype=torch.uint8)
    assert images.read_into(pixels, range(3)) == {1: "not an image of a known format"}


def test_a_shard_that_goes_while_it_is_read_ends_it(packed, open_set, serve):
    root, _ = packed
    found = [open_set(root).train, open_set(serve(root).url, retry_s=0.0).train]
    shard(root).unlink()
    for images in found:
        with pytest.raises(SourceLost, match=r"shard-000000\.tar: (No such file|not found)"):
            images.read(0)


def test_damaged_bytes_in_the_cache_are_fetched_again(packed, open_set, serve, tmp_path):
    root, _ = packed
    images = open_set(serve(root).url, cache=str(tmp_path / "cache")).train
    wanted = images.read(0)
    for chunk in (tmp_path / "cache").glob("*/*"):
        chunk.write_bytes(bytes(chunk.stat().st_size))
    assert torch.equal(images.read(0), wanted)


def test_an_index_elsewhere_reads_the_shards_where_they_are(packed, open_set, serve, tmp_path, capsys):
    root, source = packed
    server = serve(root)
    urls = [f"{server.url}/{path.name}" for path in sorted(root.glob("*.tar"))]
    assert main(["index", *urls]) == 2
    assert "add out=DIR" in capsys.readouterr().err
    assert main(["index", *urls, f"out={tmp_path / 'there'}"]) == 0
    assert main(["index", str(root), f"out={tmp_path / 'here'}"]) == 0
    for place in ("there", "here"):
        assert_same_images(by_member(open_set(tmp_path / place).train), source)
    shutil.move(tmp_path / "here", tmp_path / "moved")
    assert len(open_set(tmp_path / "moved").train) == 24


def test_an_object_store_is_read_with_the_credentials_of_the_environment(packed, open_set, monkeypatch):
    """A real S3 endpoint by moto, over s3fs."""
    import boto3
    from moto.server import ThreadedMotoServer

    root, source = packed
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.resource("s3").create_bucket(Bucket="photos")
        for path in root.iterdir():
            bucket.put_object(Key=f"set/train/{path.name}", Body=path.read_bytes())
        remove = bucket.Object("set/train/shard-000000.tar").delete
        check_served(open_set("s3://photos/set").train, source, remove)
    finally:
        server.stop()


def test_a_set_behind_nginx_is_read(packed, open_set, nginx):
    root, source = packed
    check_served(open_set(nginx(root)).train, source, shard(root).unlink)


def check_served(images, source, remove):
    """Compare a set behind a server with its source; read behind the end of a shard, and one that is gone."""
    assert_same_images(by_member(images), source)
    place = images._places[0]
    (beyond,) = ranges().read([Span(place, place.size + 10, place.size + 20)])
    assert isinstance(beyond, Unreadable)
    remove()
    with pytest.raises(SourceLost, match=rf"{re.escape(place.url)}: not found"):
        images.read(0)

import os

import pytest

from contrastive.config import UserError
from contrastive.data.decode import Unreadable
from contrastive.data.files import EXTENSIONS, is_held_out, list_images, open_class_folders, open_tree


def keys(images):
    return [images.key(row) for row in range(len(images))]


def test_any_tree_is_listed_by_path(tmp_path, write_image):
    for name in ("b/2.png", "b/10.png", "a.jpg", "b/deep/er/3.PNG", "c d/ü.webp"):
        write_image(name)
    for other in (".hidden.png", ".git/x.png", "notes.txt", "b/x.png.part", "._a.jpg"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    images = open_tree(tmp_path, 8)
    assert keys(images) == ["a.jpg", "b/10.png", "b/2.png", "b/deep/er/3.PNG", "c d/ü.webp"]
    assert images.labels is None
    assert images.classes is None
    assert images.read(1).shape == (3, 8, 8)


def test_the_order_owes_nothing_to_the_file_system(tmp_path, write_image, monkeypatch):
    for name in ("b/1.png", "a/2.png", "c.png", "a-b/3.png"):
        write_image(name)
    wanted = list_images(tmp_path)
    assert wanted == sorted(wanted)
    plain = os.scandir

    class Backwards:
        def __init__(self, path):
            with plain(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list_images(tmp_path) == wanted


def test_links_are_followed_once_and_loops_end(tmp_path, write_image):
    write_image("a/1.png")
    write_image("a/2.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")  # the same folder again
    (tmp_path / "c").symlink_to(tmp_path / "c")  # itself
    (tmp_path / "linked.png").symlink_to(tmp_path / "a" / "1.png")
    assert list_images(tmp_path) == [b"a/1.png", b"a/2.png", b"linked.png"]


def test_a_folder_outside_of_the_root_may_be_linked_in(tmp_path, write_image):
    write_image("elsewhere/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cats").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "root") == [b"cats/1.png"]


def test_a_dangling_link_is_listed_and_unreadable_but_a_pipe_is_not_opened(tmp_path, write_image):
    write_image("a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    images = open_tree(tmp_path, 8)
    assert keys(images) == ["a.png", "gone.png", "self.png"]
    for row in (1, 2):
        assert images.stamp(row) == "unreadable"
        with pytest.raises(Unreadable):
            images.read(row)


def test_names_that_are_not_utf8(tmp_path, write_image):
    source = write_image("a.png", 7)
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(source.read_bytes())
    images = open_tree(tmp_path, 8)
    assert keys(images) == ["a.png", "caf\\xe9.png"]
    images.key(1).encode()  # any log can take it
    assert (images.read(1) == 7).all()


def test_no_two_names_share_a_key_and_none_moves_the_cursor(tmp_path, write_image):
    source = write_image("a.png", 7)
    for name in (b"\xff.png", b"\\xff.png", b"\x1b[31mred.png", b"two\nlines.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(source.read_bytes())
    found = keys(open_tree(tmp_path, 8))
    assert sorted(found) == sorted(
        ["a.png", r"\xff.png", r"\\xff.png", r"\x1b[31mred.png", r"two\nlines.png"]
    )


def test_missing_file_and_empty_roots(tmp_path, write_image):
    with pytest.raises(UserError, match=r"nowhere: no such folder; set data.root"):
        open_tree(tmp_path / "nowhere", 8)
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        open_tree(write_image("a.png"), 8)
    (tmp_path / "empty").mkdir()
    for name in ("1.heic", "2.HEIC", "3.txt"):
        (tmp_path / "empty" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image file .*\.jpg \.jpeg.*2 x \.heic, 1 x \.txt"):
        open_tree(tmp_path / "empty", 8)


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_every_listed_format_is_decoded(tmp_path, write_image, ending):
    write_image(f"a{ending}", 100)
    images = open_tree(tmp_path, 8)
    assert len(images) == 1
    assert (images.read(0).int() - 100).abs().max() <= (155 if ending in (".pbm",) else 3)


def test_documents_films_and_float_pixels_are_not_taken_for_images():
    assert not {".pdf", ".ps", ".eps", ".mpg", ".h5", ".pfm", ".psd", ".ico", ".wmf"} & {*EXTENSIONS}


def test_files_left_out_are_counted_once_for_all_parts(tmp_path, write_image, caplog):
    for name in ("train/a/1.png", "val/a/2.png"):
        write_image(name)
    for name in ("train/a/1.heic", "train/a/2.HEIC", "val/a/3.heic", "val/readme", "train/.hidden.txt"):
        (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        open_class_folders(tmp_path, 8)
    (told,) = caplog.messages
    assert "left out: 3 x .heic, 1 x no extension" in told
    assert ".png or .jpg" in told
    open_tree(tmp_path / "train", 8)
    assert "train: left out: 2 x .heic" in caplog.messages[1]


def test_what_usually_lies_beside_images_is_left_out_without_a_word(tmp_path, write_image, caplog):
    write_image("a.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "readme.TXT", "labels.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert list_images(tmp_path) == [b"a.png"]
    assert caplog.messages == []
    (tmp_path / "b.heic").write_bytes(b"x")
    list_images(tmp_path)
    (told,) = caplog.messages
    assert "left out: 1 x .heic (" in told


def test_other_processes_than_the_first_say_nothing(tmp_path, write_image, caplog, monkeypatch):
    write_image("a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    monkeypatch.setenv("RANK", "1")
    open_tree(tmp_path, 8)
    assert caplog.messages == []


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, write_image, monkeypatch):
    write_image("open/1.png")
    (tmp_path / "shut").mkdir()
    plain = os.scandir

    def scandir(path):
        if b"shut" in os.fsencode(path):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"shut: cannot be listed \(Permission denied\)"):
        open_tree(tmp_path, 8)


def test_class_folders_without_a_split(tmp_path, write_image):
    for number in range(300):
        name = ("cat", "dog", "train")[number % 3]
        write_image(f"{name}/{name}-{number // 50}/{number}.png")
    train, test, by_hash = open_class_folders(tmp_path, 8)
    assert by_hash
    assert train.classes == test.classes == ["cat", "dog", "train"]
    assert len(train) + len(test) == 300
    assert not set(keys(train)) & set(keys(test))
    assert 40 <= len(test) <= 80  # 20%, binomial within 3 standard deviations
    for part in (train, test):
        assert [part.classes[label] for label in part.labels] == [key.split("/")[0] for key in keys(part)]
        assert set(part.labels.tolist()) == {0, 1, 2}  # never by class


def test_the_hash_split_is_pinned_and_moves_no_file_when_others_come(tmp_path, write_image):
    assert [n for n in range(30) if is_held_out(f"a/{n}.png".encode())] == [0, 8, 19, 20]
    for number in range(30):
        write_image(f"a/{number}.png")
    before = [set(keys(part)) for part in open_class_folders(tmp_path, 8)[:2]]
    for number in range(30):
        write_image(f"0/{number}.png")
    after = [set(keys(part)) for part in open_class_folders(tmp_path, 8)[:2]]
    assert before[0] < after[0]
    assert before[1] < after[1]


@pytest.mark.parametrize("test", ["val", "test"])
def test_class_folders_with_a_split(tmp_path, write_image, test):
    for name in ("train/b/1.png", "train/a/2.png", "train/a/3.png", f"{test}/a/4.png", f"{test}/b/5.png"):
        write_image(name)
    write_image("other/6.png")
    fit, score, by_hash = open_class_folders(tmp_path, 8)
    assert not by_hash
    assert keys(fit) == ["train/a/2.png", "train/a/3.png", "train/b/1.png"]
    assert keys(score) == [f"{test}/a/4.png", f"{test}/b/5.png"]
    assert (fit.labels.tolist(), score.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert fit.classes == ["a", "b"]


def test_val_is_taken_where_test_exists_too(tmp_path, write_image):
    for name in ("train/a/1.png", "val/a/2.png", "test/a/3.png"):
        write_image(name)
    assert keys(open_class_folders(tmp_path, 8)[1]) == ["val/a/2.png"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "validation"),
        ("train", "valid"),
        ("train", "dev"),
        ("train", "Testing"),
        ("TRAIN", "EVAL"),
        ("Train", "Test"),
        ("Training", "Validation"),
    ],
)
def test_parts_under_near_names_are_no_classes(tmp_path, write_image, caplog, train, test):
    for name in (f"{train}/b/1.png", f"{train}/a/2.png", f"{test}/a/4.png"):
        write_image(name)
    write_image("spare/other/6.png")
    fit, score, by_hash = open_class_folders(tmp_path, 8)
    assert not by_hash
    assert (keys(fit), keys(score)) == ([f"{train}/a/2.png", f"{train}/b/1.png"], [f"{test}/a/4.png"])
    assert fit.classes == score.classes == ["a", "b"]
    assert caplog.messages == [
        f"data.root={tmp_path}: {test} is the test part, and {train} the training part"
    ]


def test_exact_names_of_parts_come_before_near_ones(tmp_path, write_image):
    for name in ("train/a/1.png", "test/a/2.png", "validation/a/3.png", "Val/a/4.png"):
        write_image(name)
    assert keys(open_class_folders(tmp_path, 8)[1]) == ["test/a/2.png"]
    (tmp_path / "test").rename(tmp_path / "TEST")
    assert keys(open_class_folders(tmp_path, 8)[1]) == ["Val/a/4.png"]


def test_folders_that_may_be_parts_or_classes_are_refused(tmp_path, write_image):
    for name in ("train/a/1.png", "train/b/2.png", "holdout/a/3.png", "holdout/b/4.png", "notes/5.png"):
        write_image(name)
    with pytest.raises(
        UserError, match=r"train, holdout hold the same class folders \(a, b\).*rename holdout to"
    ):
        open_class_folders(tmp_path, 8)


def test_parts_without_class_folders_are_refused(tmp_path, write_image):
    for name in ("Train/1.png", "Valid/2.png"):
        write_image(name)
    with pytest.raises(UserError, match=r"Train/1.png lies in no class folder"):
        open_class_folders(tmp_path, 8)


def test_a_class_may_be_called_train(tmp_path, write_image, caplog):
    for number in range(20):
        write_image(f"train/{number}.png")
        write_image(f"bus/{number}.png")
    assert open_class_folders(tmp_path, 8)[0].classes == ["bus", "train"]
    assert caplog.messages == []
    for number in range(20):  # kinds of trains: the same reading, but said
        write_image(f"train/steam/{number}.png")
    assert open_class_folders(tmp_path, 8)[0].classes == ["bus", "train"]
    (told,) = caplog.messages
    assert "train is read as one class beside bus" in told


@pytest.mark.parametrize("train", ["train", "Train"])
def test_folders_without_an_image_are_not_beside_train(tmp_path, write_image, train):
    for number in range(40):
        write_image(f"{train}/{'ab'[number % 2]}/{number}.png")
    for name in ("__MACOSX/train/a/._0.png", "valid/a/notes.txt", "docs/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    images, test, by_hash = open_class_folders(tmp_path, 8)
    assert (by_hash, images.classes, len(images) + len(test)) == (True, ["a", "b"], 40)


def test_train_alone_is_split_by_hash(tmp_path, write_image):
    for number in range(40):
        write_image(f"train/{'ab'[number % 2]}/{number}.png")
    train, test, by_hash = open_class_folders(tmp_path, 8)
    assert by_hash
    assert (len(train) + len(test), train.classes) == (40, ["a", "b"])


def test_class_folder_mistakes(tmp_path, write_image):
    write_image("a/1.png")
    with pytest.raises(UserError, match=r"all 1 images fell into one part .* add images"):
        open_class_folders(tmp_path, 8)
    for number in range(20):
        write_image(f"a/{number}.png")
    loose = write_image("loose.png")
    with pytest.raises(UserError, match=r"loose.png lies in no class folder.*data.name=images"):
        open_class_folders(tmp_path, 8)
    loose.unlink()
    write_image("train/a/1.png")
    write_image("val/b/1.png")
    with pytest.raises(
        UserError, match=r"1 of 1 test images are of 1 class without a training image \(b\); both parts"
    ):
        open_class_folders(tmp_path, 8)


def test_a_split_whose_parts_are_one_folder_is_refused(tmp_path, write_image):
    write_image("train/a/1.png")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="train and val are one folder"):
        open_class_folders(tmp_path, 8)

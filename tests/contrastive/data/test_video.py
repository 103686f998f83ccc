"""Video files are written by PyAV; each frame shows its number."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import contrastive.data.video as module
from contrastive.config import DataConfig, UserError
from contrastive.data.clips import AllFrames, ClipSpec
from contrastive.data.dataset import open_dataset
from contrastive.data.decode import Unreadable
from contrastive.data.video import FrameClips, VideoClips
from eval.footage import Footage
from tests.tiny import numbered_frame, write_video
from tests.tiny import numbers_shown as numbers

av = pytest.importorskip("av")
SPEC = ClipSpec(4)


def clips(path, size=16, spec=SPEC):
    return VideoClips(path.parent, [path.name.encode()], spec, size)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("long.mp4", "libx264", {"g": "250", "bf": "3"}),  # one key frame
        ("short.mp4", "libx264", {"g": "5", "bf": "2"}),
        ("open.mkv", "libx264", {"g": "7", "bf": "2", "x264-params": "open-gop=1:scenecut=0"}),
        ("intra.mov", "mjpeg", {}),
        ("old.avi", "mpeg4", {"g": "6"}),
        ("web.webm", "libvpx-vp9", {"g": "9", "deadline": "realtime", "cpu-used": "8"}),
        ("stream.ts", "mpeg2video", {"g": "6", "bf": "2"}),
        ("raw.h264", "libx264", {"g": "6", "bf": "2"}),  # without time stamps
    ],
)
def test_every_frame_is_the_one_that_decoding_from_the_beginning_gives(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, 40, codec=codec, options=options)
    images = clips(path)
    assert len(images.times(0)) == 40
    whole = images.read_frames(0, np.arange(40))
    assert numbers(whole) == list(range(40))
    for wanted in ([39], [0], [17, 18, 19], [30, 4, 4, 22], [6, 7, 13, 14, 15]):
        found = images.read_frames(0, np.array(wanted))
        assert (found == whole[wanted]).all()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("out_of_order", ["0", "2"])
def test_a_frame_is_decoded_from_the_key_frame_before_it(tmp_path, monkeypatch, name, out_of_order):
    """Also where frames are stored in another order than they are shown in."""
    options = {"g": "10", "keyint_min": "10", "bf": out_of_order, "sc_threshold": "0"}
    path = write_video(tmp_path / name, 60, options=options)
    images, decoded = clips(path), []
    stamped = module._stamped

    def noted(container, index):
        for stamp, frame in stamped(container, index):
            decoded.append(round(frame.time * 12))
            yield stamp, frame

    monkeypatch.setattr(module, "_stamped", noted)
    images.read_frames(0, np.array([33, 35, 58]))
    assert decoded == [*range(30, 36), *range(50, 59)]


class Lost:
    """A container that seeks far too late."""

    def __init__(self, container):
        self.container = container

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def __getattr__(self, name):
        return getattr(self.container, name)

    def seek(self, stamp, **options):
        self.container.seek(stamp + 10**9, **options)


def test_where_the_files_own_index_is_wrong_decoding_begins_at_the_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    images = clips(path)
    images.times(0)
    opened = module._open
    monkeypatch.setattr(module, "_open", lambda path: Lost(opened(path)))
    assert numbers(images.read_frames(0, np.array([13, 25]))) == [13, 25]


def test_frames_of_a_variable_rate_have_their_own_times(tmp_path):
    at = [0, 1, 2, 8, 9, 15, 16, 17]
    path = write_video(tmp_path / "a.mp4", 8, at=at)
    images = clips(path, spec=ClipSpec(6, fps=6.0))
    assert images.times(0) * 12 == pytest.approx(at)
    assert numbers(images.read(0)) == [2, 2, 3, 4, 4, 4]  # from 4.7 / 12 s on, every second twelfth


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_a_turned_video_is_shown_upright(tmp_path, angle):
    """The white corner is at the top left of the stored frames; the file's angle is against the clock."""
    path = write_video(tmp_path / "a.mp4", 4, size=(32, 24), corner=True, angle=angle)
    shown = clips(path).read(0)[0, 0].double()
    quarters = {(y, x): shown[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for y in (0, 1) for x in (0, 1)}
    assert max(quarters, key=quarters.get) == {0: (0, 0), 90: (1, 0), 180: (1, 1), -90: (0, 1)}[angle]


@pytest.mark.parametrize("size", [(34, 18), (18, 34), (130, 24), (16, 16), (64, 48)])
def test_odd_shapes_become_squares(tmp_path, size):
    images = clips(write_video(tmp_path / "a.mp4", 4, size=size))
    assert images.read(0).shape == (4, 3, 16, 16)
    assert images.dimensions(0) == size
    assert numbers(images.read(0)) == [0, 1, 2, 3]


def test_pixels_that_were_cached_when_frames_were_decoded_otherwise_are_not_used(tmp_path, monkeypatch):
    images = clips(write_video(tmp_path / "a.mp4", 4))
    before, stamp = images.revision(), images.stamp(0)
    monkeypatch.setattr(module, "_DECODED", "otherwise")
    assert images.revision() != before
    assert images.stamp(0) == stamp  # a resume goes by this


def test_odd_numbers_of_pixels_and_sound_are_fine(tmp_path):
    path = write_video(tmp_path / "a.mkv", 5, codec="ffv1", size=(33, 27), pixels="yuv444p", sound=True)
    assert numbers(clips(path).read_frames(0, np.arange(5))) == [0, 1, 2, 3, 4]


def test_colours_are_as_sharp_as_brightness(tmp_path):
    """Stripes of red and blue, as wide as one pixel of the result."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[..., 0], stripes[..., 2] = (255 * (np.arange(64) // 4 % 2 == odd) for odd in (0, 1))
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        file.mux(stream.encode())
    red, _, blue = clips(path).read_frames(0, np.array([0]))[0].int()
    assert ((red - blue).abs() > 200).all()
    assert ((red > blue) == (torch.arange(16) % 2 == 0)).all()


def broken(folder):
    """Write the broken files; return what is said of each."""
    good = write_video(folder / "good.mp4", 40, size=(64, 64)).read_bytes()
    early = write_video(folder / "early.mp4", 40, size=(64, 64), container={"movflags": "faststart"})
    early = early.read_bytes()
    (folder / "early.mp4").unlink()
    write_video(folder / "one.mp4", 1)
    write_video(folder / "sound.mp4", 0, sound=True)
    files = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 50,
        "noise.mkv": np.random.default_rng(0).bytes(5000),
        "head.mp4": good[:40],
        "no_index.mp4": good[: len(good) // 2],
        "cut.mp4": early[: len(early) * 2 // 3],
        "image.mp4": b"\x89PNG\r\n\x1a\n" + bytes(60),
        "list.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    return {
        "one.mp4": "1 frame, a video needs 2 or more",
        "sound.mp4": "no pictures in it",
        "empty.mp4": "empty file",
        "text.mp4": "Invalid data",
        "noise.mkv": "Invalid data",
        "head.mp4": ".",
        "no_index.mp4": "Invalid data",
        "cut.mp4": "cut off: ",
        "image.mp4": ".",
        "list.mp4": "a list of other files",
        "folder.mp4": ".",
        "gone.mp4": "No such file",
    }


def test_broken_videos_are_unreadable_each_for_its_reason(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(Unreadable, match=words) as error:
            clips(tmp_path / name).read(0)
        assert "\n" not in str(error.value)
    assert numbers(clips(tmp_path / "good.mp4").read_frames(0, np.array([39]))) == [39]


def test_a_spawned_worker_gets_what_is_known_of_the_videos(tmp_path):
    images = clips(write_video(tmp_path / "a.mp4", 8))
    images.times(0)
    again = pickle.loads(pickle.dumps(images))
    assert numbers(again.read_frames(0, np.array([7]))) == [7]
    assert again._indices.keys() == {0}


def test_only_so_many_videos_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    paths = [write_video(tmp_path / f"{name}.mp4", 3) for name in "abc"]
    images = VideoClips(tmp_path, [path.name.encode() for path in paths], SPEC, 16)
    for row in (0, 1, 2):
        images.times(row)
    assert [*images._indices] == [1, 2]


def opened(root, **settings):
    return open_dataset(DataConfig(name="clips", root=str(root), image_size=16, frames=4, **settings))


def test_class_folders_of_two_parts_are_labels(tmp_path):
    for part, count in (("train", 3), ("test", 1)):
        for number in range(count):
            for name in ("jump", "run"):
                write_video(tmp_path / part / name / f"{number}.mp4", 6)
    (tmp_path / "train" / "notes.txt").write_text("x")
    data = opened(tmp_path)
    assert (len(data.train), len(data.test), data.train.classes) == (6, 2, ["jump", "run"])
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.train.key(0), data.held_out_by_hash) == ("train/jump/0.mp4", False)
    assert data.labelled is data.train


def test_class_folders_without_parts_hold_some_out(tmp_path):
    for number in range(8):
        for name in ("jump", "run"):
            write_video(tmp_path / name / f"{number}.mp4", 2)
    data = opened(tmp_path)
    assert data.held_out_by_hash
    assert len(data.train) + len(data.test) == 16


@pytest.mark.parametrize(
    "names", [("a.mp4", "b.mp4"), ("2024/05/a.mp4", "2024/b.mp4"), ("one/a.mp4", "one/b.mp4")]
)
def test_other_trees_have_no_labels_and_are_trained_on_whole(tmp_path, names):
    for name in names:
        write_video(tmp_path / name, 5)
    data = opened(tmp_path)
    assert (data.labelled, data.test, len(data.train)) == (None, None, 2)


def write_frames(folder, count, zeros=False):
    folder.mkdir(parents=True)
    for number in range(count):
        name = f"{number:04}" if zeros else str(number)
        Image.fromarray(numbered_frame(number, (24, 20))).save(folder / f"f{name}.png")


def test_folders_of_frames_are_videos_in_the_order_of_their_numbers(tmp_path):
    for name in ("jump", "run"):
        for clip in range(6):
            write_frames(tmp_path / name / f"clip{clip}", 12, zeros=clip % 2)
    data = opened(tmp_path, frame_step=3)
    assert isinstance(data.train, FrameClips)
    assert len(data.train) + len(data.test) == 12
    assert data.train.classes == ["jump", "run"]
    assert data.train.key(0) == "jump/clip2"  # others are held out
    for row in range(len(data.train)):
        assert numbers(data.train.read(row)) == [1, 4, 7, 10]
    assert data.train.stamp(0).startswith("12 ")
    assert data.train.dimensions(0) == (24, 20)
    before = data.train.revision()
    (tmp_path / "jump" / "clip2" / "f3.png").unlink()
    assert data.train.revision() != before
    assert data.train.stamp(0).startswith("11 ")


def test_folders_of_frames_are_found_at_any_depth(tmp_path):
    for name in ("a", "2024/b", "2024/05/c", "2024/05/06/07/d"):
        write_frames(tmp_path / name, 2)
    train = opened(tmp_path).train
    assert [train.key(row) for row in range(len(train))] == ["2024/05/06/07/d", "2024/05/c", "2024/b", "a"]


def test_folders_of_frames_are_called_videos_where_a_part_of_the_classes_is_missing(tmp_path):
    for part, name in (("train", "jump"), ("train", "run"), ("test", "run"), ("test", "swim")):
        write_frames(tmp_path / part / name / "0", 2)
    with pytest.raises(
        UserError, match=r"1 of 2 test videos are of 1 class without a training video \(swim\)"
    ):
        opened(tmp_path)


def test_a_folder_of_one_frame_and_a_broken_frame_are_unreadable(tmp_path):
    write_frames(tmp_path / "still", 1)
    write_frames(tmp_path / "torn", 5)
    (tmp_path / "torn" / "f2.png").write_bytes(b"")
    images = FrameClips(tmp_path, [b"still", b"torn", b"gone"], SPEC, 16)
    for row, words in enumerate(("1 frame, a video", "empty file", "No such file")):
        with pytest.raises(Unreadable, match=words):
            images.read(row)
    assert images.stamp(2) == images.version(2) == "unreadable"


def test_frames_have_the_white_of_their_set(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a" / f"{number}.png")
    assert opened(tmp_path, white=4095).train.read(0).unique().tolist() == [255]
    assert Footage(tmp_path, 16, 4095).read(0).unique().tolist() == [255]


def test_a_video_that_loses_a_frame_while_it_is_read_is_unreadable_and_no_other_is(tmp_path):
    """Its numbers would mean other frames; a data set that is opened later knows nothing of the frame."""
    for name in ("a", "b"):
        write_frames(tmp_path / name, 5)
    frames = AllFrames(FrameClips(tmp_path, [b"a", b"b"], SPEC, 16))
    (tmp_path / "a" / "f1.png").unlink()
    pixels = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    bad = frames.read_into(pixels, range(10))
    assert bad == dict.fromkeys(range(5), "4 frames, 5 before: it changes while it is read")
    assert numbers(pixels[5:]) == [0, 1, 2, 3, 4]
    assert numbers(FrameClips(tmp_path, [b"a"], SPEC, 16).read_frames(0, np.arange(4))) == [0, 2, 3, 4]


def test_frames_have_no_clock(tmp_path):
    write_frames(tmp_path / "a", 5)
    with pytest.raises(UserError, match=r"no clock; use data.frame_step"):
        opened(tmp_path, fps=5.0)


def test_a_folder_without_videos_and_a_missing_package_are_explained(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no video file below it"):
        opened(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'contrastive-pretrain\[video\]'"):
        opened(tmp_path)


def test_images_beside_video_files_are_said_not_to_be_taken(tmp_path, caplog):
    write_frames(tmp_path / "frames", 5)
    write_video(tmp_path / "films" / "a.mp4", 5)
    dataset = opened(tmp_path)
    assert [dataset.train.key(row) for row in range(len(dataset.train))] == ["films/a.mp4"]
    assert "the video files are taken, and images beside them are not" in caplog.text


def test_a_time_base_that_is_not_the_rate(tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, rate=Fraction(30000, 1001))
    assert clips(path).times(0) == pytest.approx(np.arange(10) * 1001 / 30000, abs=1e-3)  # Matroska's unit

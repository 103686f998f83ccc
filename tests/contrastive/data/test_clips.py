import numpy as np
import pytest
import torch

from contrastive.augment.moments import DrawMoments
from contrastive.config import DataConfig, TimeConfig, UserError
from contrastive.data.clips import AllFrames, Clips, ClipSpec, DrawnClips, check_moves, draw_clips, fits
from contrastive.data.dataset import as_dataset
from contrastive.data.decode import Unreadable
from contrastive.data.loader import DecodingLoader, ResidentClips, build_loader
from contrastive.data.plan import Plan, Share
from contrastive.data.reading import decode_all
from contrastive.data.wrapped import SomeImages
from tests.contrastive.data.test_loader import numbered
from tests.reference import clips as reference

CPU = torch.device("cpu")
DATA = DataConfig(frames=3, image_size=8)
MOMENTS = DataConfig(image_size=8)  # single frames


class Counted(Clips):
    """Videos of 5 to 11 frames, whose pixels are the number of the video and that of the frame."""

    def __init__(self, videos=20, bad=(), spec=None):
        super().__init__(spec or ClipSpec.of(DATA), 8)
        self.videos, self.bad, self.opened = videos, bad, 0
        self.labels, self.classes = torch.arange(videos) % 2, ["even", "odd"]

    def __len__(self):
        return self.videos

    def times(self, row):
        if row in self.bad:
            raise Unreadable("broken")
        return np.arange(5 + row % 7) / 10

    def read_frames(self, row, indices):
        self.opened += 1
        pixels = torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)
        pixels[:, 0], pixels[:, 1] = row, torch.from_numpy(indices)[:, None, None]
        return pixels

    def key(self, row):
        return f"counted/{row}"

    def stamp(self, row):
        return "1"


def drawn(source=None, seed=0, data=DATA, **time):
    return draw_clips(source or Counted(), data, DrawMoments(TimeConfig(**time), seed))


def load(images, resident, workers=0, cache=None, accumulate=1, rank=0, world=1, told=None, epochs=2):
    data = DataConfig(
        resident=resident, num_workers=workers, cache=cache and str(cache), max_corrupt=0.5, image_size=8
    )
    plan = Plan(len(images), 3, 8, epochs)
    return build_loader(
        images,
        plan,
        data,
        device=CPU,
        share=Share(rank, world, accumulate),
        on_corrupt=(lambda *_: None) if told is None else (lambda *bad: told.append(bad)),
    )


@pytest.mark.parametrize("start", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("count", [2, 9, 30])
@pytest.mark.parametrize("step", [1, 3])
def test_every_nth_frame(count, step, start):
    found = ClipSpec(5, step).indices(np.arange(count) / 25, start)
    assert found.tolist() == reference.frames_by_number(count, 5, step, start)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("fps", [4.0, 7.3, 40.0])
def test_frames_by_the_clock_of_a_video_of_variable_rate(fps, start):
    times = np.array([2.0, 2.1, 2.15, 2.5, 2.6, 3.4, 3.5])
    assert ClipSpec(4, fps=fps).indices(times, start).tolist() == reference.frames_by_clock(
        times, 4, fps, start
    )


def test_a_rate_that_is_the_videos_own_takes_each_frame_once():
    """Though 1 / 12 has no exact binary representation."""
    times = np.array([1024 * k / 12288 for k in range(600)])
    assert ClipSpec(600, fps=12.0).indices(times, 0.0).tolist() == list(range(600))


def test_speed_stretches_a_clip_and_a_negative_one_turns_it_round():
    times = np.arange(40.0)
    assert ClipSpec(4, 2).indices(times, 0.0, 3.0).tolist() == [0, 6, 12, 18]
    assert ClipSpec(4, 2).indices(times, 0.0, -1.0).tolist() == [6, 4, 2, 0]
    assert ClipSpec(4, 2).indices(times, 0.0, 0.5).tolist() == [0, 1, 2, 3]


def test_evaluation_takes_clips_evenly():
    spec = ClipSpec(2, clips=3)
    assert spec.evenly(np.arange(61.0)).tolist() == [10, 11, 30, 31, 50, 51]
    assert Counted(spec=spec).read(6)[:, 1, 0, 0].tolist() == [1, 2, 5, 6, 8, 9]
    assert Counted(spec=spec).shape == (6, 3, 8, 8)


def test_a_video_needs_two_frames():
    for count, words in ((0, "0 frames, a video"), (1, "1 frame, a video")):
        with pytest.raises(Unreadable, match=words):
            check_moves(count)
    check_moves(2)


def test_a_clip_is_a_function_of_seed_epoch_row_and_view():
    clips = drawn().in_epoch(4)
    whole = {row: clips.read(row) for row in range(20)}
    for row in (7, 3):
        assert torch.equal(drawn().in_epoch(4).read(row), whole[row])
    for other in (drawn().in_epoch(5), drawn(seed=1).in_epoch(4)):
        assert not all(torch.equal(other.read(row), whole[row]) for row in range(20))
    assert whole[0].shape == (6, 3, 8, 8)  # of two views
    assert not torch.equal(whole[6][:3], whole[6][3:])
    assert all((clip[:, 1, 0, 0].diff()[[0, 1, 3, 4]] == 1).all() for clip in whole.values())


def test_speed_and_direction_change_only_where_asked_for():
    numbers = torch.arange(500)
    starts, speeds = DrawMoments(TimeConfig(), 0)(numbers, 0)
    assert (speeds == 1).all()
    assert ((starts >= 0) & (starts < 1)).all()
    speeds = DrawMoments(TimeConfig(speed=[0.5, 2.0], reverse=0.25), 0)(numbers, 0)[1]
    assert 0.5 <= speeds.abs().min() < 0.55
    assert 1.9 < speeds.abs().max() <= 2
    assert (speeds < 0).double().mean() == pytest.approx(0.25, abs=0.05)
    assert speeds.abs().log().mean() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("most", [0.5, 1.0])
def test_gaps_have_the_density_that_was_asked_for(decay, most):
    """The mean of density (1 - g) ** d is 1 / (d + 2); either clip may be the earlier."""
    starts = DrawMoments(TimeConfig(max_gap=most, gap_decay=decay), 0)(torch.arange(20_000), 0)[0]
    gap = starts[:, 1] - starts[:, 0]
    assert gap.abs().max() <= most
    assert gap.abs().mean() == pytest.approx(most / (decay + 2), rel=0.03)
    assert (gap > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    if decay == most == 1:  # each start alone is then uniform
        assert starts.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
        assert starts.var(0).tolist() == pytest.approx([1 / 12, 1 / 12], rel=0.03)


@pytest.mark.parametrize("data", [DATA, MOMENTS], ids=["clips", "moments"])
def test_no_gap_gives_both_views_the_same_frames(data):
    clips = drawn(data=data, max_gap=0.0)
    assert all(torch.equal(*clips.read(row).chunk(2)) for row in range(20))


def test_single_frames_are_two_moments_in_training_and_the_middle_one_elsewhere():
    source = Counted(spec=ClipSpec.of(MOMENTS))
    assert source.read(6).shape == source.shape == (3, 8, 8)
    assert source.read(6)[1, 0, 0] == 5  # of 11
    assert source.noun == SomeImages(source, torch.tensor([6])).noun == "videos"
    moments = drawn(source, data=MOMENTS)
    both = [moments.in_epoch(epoch).read(6)[:, 1, 0, 0].tolist() for epoch in range(200)]
    assert {frame for pair in both for frame in pair} == {*range(11)}
    assert {first - second for first, second in both} > {-9, -1, 0, 1, 9}
    near = drawn(source, data=MOMENTS, max_gap=0.2)
    gaps = [near.in_epoch(epoch).read(6)[:, 1, 0, 0].int().diff().item() for epoch in range(200)]
    assert {0, 1, 2} <= {*map(abs, gaps)} <= {0, 1, 2, 3}  # 2.2 of 11 frames, each moment rounded down


@pytest.mark.parametrize("data", [DATA, MOMENTS], ids=["clips", "moments"])
@pytest.mark.parametrize("kind", ["resident", "cache", "resident cache", "workers"])
def test_every_loader_delivers_the_same_clips(kind, data, tmp_path):
    """Also in micro-batches and on ranks; -1 stands for a video that cannot be read."""
    source = Counted(bad=(5,), spec=ClipSpec.of(data))
    images = drawn(source, data=data)
    cache = tmp_path if "cache" in kind else None
    resident = "true" if "resident" in kind else "false"
    loader = load(images, resident, 2 if kind == "workers" else 0, cache)
    assert isinstance(loader, ResidentClips if "resident" in kind else DecodingLoader)
    expected = [*load(drawn(source, data=data), "false")]
    batches = [*loader]
    for step, (ours, theirs) in enumerate(zip(batches, expected, strict=True)):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.images, theirs.images)
        assert ours.images.shape == (len(ours.ids), 2 * data.frames, 3, 8, 8)
        for clip, row in zip(ours.images, ours.ids.tolist(), strict=True):
            assert torch.equal(clip, images.in_epoch(step // 2).read(row))
    parts = [load(images, resident, 0, cache, 2, rank, 2) for rank in range(2)]
    in_parts = [batch.images for group in zip(*parts, strict=True) for batch in group]
    assert torch.equal(torch.cat(in_parts), torch.cat([batch.images for batch in expected]))
    assert any(5 in Plan(20, 3, 8, 2).ids(step) for step in range(4))


@pytest.mark.parametrize("kind", [("true", None), ("false", None), ("false", "cache"), ("true", "cache")])
def test_unreadable_videos_are_counted_and_named(kind, tmp_path):
    told = []
    loader = load(
        drawn(Counted(bad=(2, 5))), kind[0], cache=kind[1] and tmp_path / kind[1], told=told, epochs=12
    )
    seen = {row for batch in loader for row in batch.ids.tolist()}
    assert sorted(told) == [(2, "broken"), (5, "broken")]
    assert seen == {*range(20)} - {2, 5}


def test_a_cache_is_read_instead_of_the_videos(tmp_path):
    [*load(drawn(), "false", cache=tmp_path)]
    source = Counted()
    [*load(drawn(source), "false", cache=tmp_path)]
    assert source.opened == 0


def test_all_frames_are_numbered_and_read_once_a_video():
    source = Counted(6, bad=(1,))
    frames = AllFrames(source)
    assert len(frames) == 5 + 0 + 7 + 8 + 9 + 10
    assert (frames.key(5), frames.key(4)) == ("counted/2#0", "counted/0#4")
    decoded = decode_all(frames)
    assert source.opened == 5  # in one block
    assert decoded.images[5:12, 0, 0, 0].tolist() == [2] * 7
    assert decoded.images[5:12, 1, 0, 0].tolist() == list(range(7))
    assert frames.videos({6: "damaged"}) == {1: "broken", 2: "damaged"}
    assert frames.revision() != AllFrames(Counted(5)).revision()


def test_counting_stops_where_a_set_does_not_fit():
    asked = []

    class Noted(Counted):
        def times(self, row):
            asked.append(row)
            return super().times(row)

    assert not fits(Noted(), (5 + 6 + 7) * 3 * 8 * 8 - 1)
    assert asked == [0, 1, 2]
    assert fits(Noted(3), (5 + 6 + 7) * 3 * 8 * 8)


def test_a_part_of_the_videos_has_its_own_clips():
    some = SomeImages(Counted(), torch.tensor([6, 3]))
    assert some.frames == 3
    assert torch.equal(some.read(0), Counted().read(6))
    assert torch.equal(drawn(some).read(1)[:, 0, 0, 0], torch.full((6,), 3, dtype=torch.uint8))


def test_images_stay_as_they_are():
    images = numbered(4)
    assert draw_clips(images, DATA, DrawMoments(TimeConfig(), 0)) is images
    assert images.in_epoch(3) is images
    assert images.shape == (3, 2, 2)


def test_frames_are_asked_for_where_there_are_some_and_refused_elsewhere():
    assert as_dataset(Counted(), DATA).train.frames == 3
    assert as_dataset(Counted(spec=ClipSpec.of(MOMENTS)), MOMENTS).train.frames == 0
    with pytest.raises(UserError, match=r"data.frames=1: .* gives 3; set data.clips_per_video=1, or pre"):
        as_dataset(Counted(), MOMENTS)
    with pytest.raises(UserError, match=r"data.frames=3: .* has images, not videos; .*is evaluated on clips"):
        as_dataset(numbered(4, 8), DATA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fps": 8.0, "frame_step": 2}, "both set the distance"),
        ({"fps": 0.0}, "data.fps=0"),
        ({"frames": 0}, "data.frames=0"),
        ({"clips_per_video": 0}, "data.clips_per_video=0"),
    ],
)
def test_settings_of_time_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**settings)


@pytest.mark.parametrize("speed", [[2.0, 1.0], [0.0, 1.0], [1.0]])
def test_speeds_are_checked(speed):
    with pytest.raises(ValueError, match=r"augment.time.speed"):
        TimeConfig(speed=speed)


def test_drawn_clips_know_their_videos():
    clips = drawn()
    assert isinstance(clips, DrawnClips)
    assert (len(clips), clips.key(3), clips.stamp(3)) == (20, "counted/3", "1")

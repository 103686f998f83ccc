"""Actions of recordings: the algorithm on known truth, scores against loops, the command, wrong input."""

import csv
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.config import UserError
from eval.__main__ import main
from eval.action_scores import runs, score_actions
from eval.footage import Footage
from eval.segment import SegmentConfig, check_lengths
from eval.segmenting import (
    DECODERS,
    count_transitions,
    decode,
    describe_windows,
    estimate_duration,
    project,
    segment,
    switch_cost,
)
from eval.transport import decode_by_transport, plan
from tests.reference import segments as reference


def routines(noise, *, looks=1, recordings=12, actions=6, seed=0):
    """Return noisy features of routines, the true actions, and where recordings start.

    An action has several looks, of which each frame shows one.
    """
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(actions, looks, 16))
    features, truth, starts = [], [], [0]
    for _ in range(recordings):
        order = [int(draw.integers(actions))]
        while len(order) < 8:
            order.append(int(draw.choice([each for each in range(actions) if each != order[-1]])))
        labels = np.repeat(order, draw.integers(15, 45, len(order)))
        shown = centres[labels, draw.integers(looks, size=len(labels))]
        features.append(shown + noise * draw.normal(size=shown.shape))
        truth.append(labels)
        starts.append(starts[-1] + len(labels))
    return np.concatenate(features).astype(np.float32), np.concatenate(truth), np.array(starts)


def frames_right(predicted, truth, starts):
    return score_actions(predicted, truth, starts, each=False)[0].value


def test_noisy_actions_of_one_look_are_recovered():
    features, truth, starts = routines(1.0)
    found = segment(features, starts, sub_actions=6, actions=6)
    assert frames_right(found.path, truth, starts) >= 0.99
    assert frames_right(found.argmax, truth, starts) < 0.98
    assert abs(len(runs(found.path)) - len(runs(truth))) < 5 < 100 < len(runs(found.argmax))


def test_looks_that_follow_one_another_are_grouped_and_their_number_is_chosen():
    features, truth, starts = routines(0.6, looks=3)
    split = segment(features, starts, sub_actions=6, actions=6)
    assert frames_right(split.path, truth, starts) < 0.8
    found = segment(features, starts, sub_actions=24)
    assert len({*found.group.tolist()}) == 6
    assert frames_right(found.path, truth, starts) >= 0.99


def test_the_duration_is_estimated_under_flicker():
    draw = np.random.default_rng(0)
    labels = np.repeat(draw.integers(0, 5, 300), draw.geometric(1 / 30, 300))
    starts = np.array([0, len(labels) // 2, len(labels)])
    for flicker in (0.0, 0.3):
        seen = np.where(draw.random(len(labels)) < flicker, draw.integers(0, 5, len(labels)), labels)
        # An action drawn anew may be the same one: the mean run is 30 * 5 / 4.
        assert estimate_duration(seen, starts) == pytest.approx(30, rel=0.25)


def test_the_path_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, cost = draw.normal(size=(12, 3)), draw.random((3, 3)) * 3
        found = decode(scores, np.array([0, 5, 12]), cost)
        expected = [
            *reference.best_path(scores[:5].tolist(), cost),
            *reference.best_path(scores[5:].tolist(), cost),
        ]
        assert found.tolist() == expected


@pytest.mark.parametrize("frames", [6, 75])
def test_the_transport_plan_equals_loops(frames):
    cost = np.random.default_rng(0).random((frames, 3)) * 2
    expected = reference.transport_plan(
        cost.tolist(), alpha=0.6, radius=0.04, balance=0.01, entropy=0.04, steps=25, first=4.0
    )
    found = plan(cost)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1)
    both = decode_by_transport(np.concatenate([cost, cost[::-1]]), np.array([0, frames, 2 * frames]))
    assert both.tolist() == [*found.argmax(1), *found.argmax(1)[::-1]]


def test_transport_recovers_noisy_actions():
    features, truth, starts = routines(1.0)
    found = segment(features, starts, sub_actions=6, actions=6, decoder="transport")
    assert frames_right(found.path, truth, starts) >= 0.99
    assert frames_right(found.argmax, truth, starts) < 0.98
    features, truth, starts = routines(0.6, looks=3)
    found = segment(features, starts, sub_actions=24, decoder="transport")
    assert frames_right(found.path, truth, starts) >= 0.99


def test_switches_cost_what_their_probability_says():
    labels, starts = np.array([0, 0, 1, 1, 2, 0, 1]), np.array([0, 4, 7])
    counts = count_transitions(labels, starts, 3)
    assert counts.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]  # none from frame 3 to frame 4
    shares = np.exp(-switch_cost(labels, starts, 3, 10.0))
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares.diagonal(), 0.9)
    assert shares[0, 1] == pytest.approx(0.1 * 3 / 4)


def test_windows_hold_the_mean_and_the_deviation_of_whitened_frames():
    features = np.random.default_rng(0).normal(size=(30, 4)) * 3 + 7
    starts = np.array([0, 20, 30])
    found = describe_windows(features, starts, 5)
    rows = features[20:] - features[20:].mean(0)
    variances, axes = np.linalg.eigh(np.cov(rows.T, ddof=0))
    parts = zip(variances, axes.T, strict=True)
    rows = sum(np.outer(rows @ axis, axis) / np.sqrt(v + 0.003 * variances.sum()) for v, axis in parts)
    rows /= np.sqrt((rows**2).sum(1).mean())
    padded = np.concatenate([rows[1::-1], rows, rows[:-3:-1]])
    for frame in range(10):
        seen = padded[frame : frame + 5]
        np.testing.assert_allclose(found[20 + frame], [*seen.mean(0), *seen.std(0)], atol=1e-6)
    assert describe_windows(features, starts, 1).shape == (30, 4)


def test_the_side_that_is_seen_does_not_hide_the_action():
    """Though it changes features three times as much, and another way in each recording."""
    features, truth, starts = routines(0.3)
    draw = np.random.default_rng(1)
    for start, end in pairwise(starts):
        sides = np.repeat(draw.normal(size=(40, 1)), 10, 0)[: end - start]
        features[start:end] += 3 * sides * draw.normal(size=16)
    found = segment(describe_windows(features, starts, 3), starts, sub_actions=6, actions=6)
    assert frames_right(found.path, truth, starts) > 0.9


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("found", [2, 3, 5])
def test_scores_equal_loops_on_random_segmentations(each, found):
    draw = np.random.default_rng(found)
    starts = np.array([0, 25, 60, 80])
    truth = np.repeat(draw.integers(0, 3, 40), 2)
    predicted = np.where(draw.random(80) < 0.5, truth % found, np.repeat(draw.integers(0, found, 20), 4))
    pairs = [(predicted[a:b].tolist(), truth[a:b].tolist()) for a, b in pairwise(starts)]
    whole = reference.best_match(predicted.tolist(), truth.tolist())
    named = []
    for mine, real in pairs:
        names = reference.best_match(mine, real) if each else whole
        named.append(([names[label] for label in mine], real))
    scores = {line.name: line for line in score_actions(predicted, truth, starts, each=each)}
    assert scores["MoF"].value == pytest.approx(reference.frames_right(named))
    if each or found == 3:  # otherwise several assignments may be as good, and the others differ
        return
    expected = {f"F1@{k}": reference.f1(named, k / 100) for k in (10, 25, 50)}
    expected |= {"mIoU": reference.mean_iou(named), "edit": reference.edit(named)}
    assert {name: scores[name].value for name in expected} == pytest.approx(expected)


def test_gains_are_differences_of_scores_and_intervals_the_jackknifes():
    truth = np.repeat(np.arange(4), 30)
    starts = np.arange(0, 121, 20)
    predicted = truth.copy()
    predicted[:10] = 3
    line = score_actions(predicted, truth, starts, each=False)[0]
    assert line.value == pytest.approx(110 / 120)
    assert float(line.paired.mean()) == pytest.approx(line.value)
    per_recording = np.array([0.5, 1, 1, 1, 1, 1])  # equal lengths: pseudo-values are the recordings' own
    np.testing.assert_allclose(line.paired[0], per_recording, atol=1e-6)
    assert line.kind == "jackknife over 6 recordings"


COLOURS = {"sit": (200, 30, 30), "walk": (30, 200, 30), "fall": (30, 30, 200)}


@pytest.fixture
def footage(tmp_path):
    """Three folders of frames of three actions, each a colour, with their tables."""
    draw = np.random.default_rng(0)
    root = tmp_path / "footage"
    for number in range(3):
        folder = root / f"day{number}"
        folder.mkdir(parents=True)
        order = ["sit", "walk", "fall", "walk"][number % 2 :]
        actions = [name for name in order for _ in range(int(draw.integers(8, 14)))]
        for frame, action in enumerate(actions):
            pixels = draw.integers(0, 30, (16, 16, 3)) + np.array(COLOURS[action])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{frame}.png")
        with (root / f"day{number}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["frame", "action"], *enumerate(actions)])
    return root


def command(run, root, *more):
    given = [f"data.root={root}", "data.name=images", "device=cpu", "progress=false", "segment.window=3"]
    return main(["segment", f"checkpoint={run}", *given, *more])


def refused(capsys, *given):
    assert command(*given) == 2
    return capsys.readouterr().err


def test_recordings_are_segmented_scored_and_drawn(shared_run, footage, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(shared_run, footage, f"out={out}", "segment.actions=3", "segment.sub_actions=3") == 0
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    assert short["scores"]["MoF path, set"]["raw_pixels"] > 0.9
    assert short["top1"] == short["scores"]["MoF path, set"]["encoder"]
    assert len(short["scores"]) == 24
    assert "3 actions (given) of 3 sub-actions" in told.err
    assert re.search(
        r"^MoF path, set: .*ours gains .* over raw pixels and .* over the random", told.err, re.M
    )
    with (out / "segments.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for number in range(3):
        mine = [row for row in rows if row["recording"] == f"day{number}"]
        ends = [(int(row["first"]), int(row["last"]), int(row["typical"])) for row in mine]
        assert ends[0][0] == 0
        assert ends[-1][1] == len([*(footage / f"day{number}").iterdir()]) - 1
        assert all(last + 1 == first for (_, last, _), (first, _, _) in pairwise(ends))
        assert all(first <= typical <= last for first, last, typical in ends)
    assert {row["action"] for row in rows} <= {*COLOURS}
    words = (out / "segment.html").read_text()
    assert words.count('aria-label="actions"') == 3
    assert "true above found" in words

    given = (f"out={out}", "segment.actions=3", "segment.sub_actions=3", "segment.decoder=transport")
    assert command(shared_run, footage, *given) == 0
    by_transport = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert by_transport["MoF path, set"]["raw_pixels"] > 0.9
    assert "viterbi, transport" in refused(capsys, shared_run, footage, "segment.decoder=ot")

    for table in footage.glob("*.csv"):
        table.unlink()
    assert command(shared_run, footage, f"out={out}") == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["scores"] == {}
    assert "chosen by the largest gap" in told.err
    assert "action 0" in (out / "segments.csv").read_text()


def test_wrong_input_is_refused(shared_run, footage, tmp_path, capsys):
    table = footage / "day1.csv"
    text = table.read_text().splitlines()
    table.write_text("\n".join(text[:-2]) + "\n")
    assert f"actions of {len(text) - 3} frames, the recording has {len(text) - 1}" in refused(
        capsys, shared_run, footage
    )
    table.write_text("\n".join([*text[:4], *text[5:]]) + "\n")
    assert "frame '4' where 3 is due" in refused(capsys, shared_run, footage)
    table.unlink()
    assert "1 of 3 recordings have no table" in refused(capsys, shared_run, footage)
    table.write_text("\n".join(text) + "\n")
    assert "segment.sub_actions: 5000 clusters of" in refused(
        capsys, shared_run, footage, "segment.sub_actions=5000"
    )
    assert "segment.window=4" in refused(capsys, shared_run, footage, "segment.window=4")
    assert "more than segment.sub_actions=2" in refused(
        capsys, shared_run, footage, "segment.actions=3", "segment.sub_actions=2"
    )
    (footage / "day0" / "3.png").unlink()
    assert "frames 3 are missing" in refused(capsys, shared_run, footage)
    assert "no recording" in refused(capsys, shared_run, footage / "day2")
    assert "no such folder" in refused(capsys, shared_run, tmp_path / "none")


def write_video(path, frames):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for value in frames:
            picture = np.full((32, 32, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def test_frames_of_video_files_are_read_in_any_order(tmp_path):
    write_video(tmp_path / "b.mp4", range(0, 200, 10))
    write_video(tmp_path / "a.mp4", range(200, 100, -10))
    footage = Footage(tmp_path, 16)
    assert footage.names == ["a", "b"]
    assert footage.starts.tolist() == [0, 10, 30]
    expected = [*range(200, 100, -10), *range(0, 200, 10)]
    for row in [*range(30), 29, 12, 3]:
        assert abs(float(footage.read(row).float().mean()) - expected[row]) < 6
    assert footage.key(12) == "b#2"
    pixels = torch.zeros(30, 3, 16, 16, dtype=torch.uint8)
    assert footage.read_into(pixels, range(30)) == {}
    for row in (0, 9, 10, 29):
        assert torch.equal(pixels[row], footage.read(row))


def test_clusters_of_single_frames_and_windows_beyond_a_recording_are_refused(footage):
    frames = Footage(footage, 16)
    check_lengths(frames, SegmentConfig(sub_actions=len(frames) - 1))
    with pytest.raises(UserError, match=rf"{len(frames)} clusters of {len(frames)} frames; set segment.sub_"):
        check_lengths(frames, SegmentConfig(sub_actions=len(frames)))
    with pytest.raises(UserError, match=r"3 recordings have fewer frames \(day0, day1, day2; the shortest"):
        check_lengths(frames, SegmentConfig(window=1001))


def test_a_broken_frame_leaves_its_neighbours_readable(footage):
    (footage / "day1" / "3.png").write_bytes(b"no image")
    frames = Footage(footage, 16)
    start = int(frames.starts[1])
    rows = range(start - 2, start + 6)
    pixels = torch.zeros(len(rows), 3, 16, 16, dtype=torch.uint8)
    assert frames.read_into(pixels, rows) == {start + 3: "not an image of a known format"}
    assert torch.equal(pixels[6], frames.read(start + 4))


def test_a_file_that_is_no_video_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", range(0, 200, 10))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"1 of 2 recordings cannot be read \(b.mp4: .*; repair them"):
        Footage(tmp_path, 16)


def test_few_frames_of_many_features_have_the_components_of_the_larger_matrix():
    """Compute the same components from the matrix of frames as from that of features."""
    few = np.random.default_rng(0).normal(size=(12, 40)).astype(np.float32)
    many = np.concatenate([few, few, few, few])  # the same components
    found, wanted = project(few, 5), project(many, 5)[:12]
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found * signs, wanted, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_features_that_never_change_are_one_action(decoder):
    starts = np.array([0, 20, 40])
    windows = describe_windows(np.ones((40, 64), np.float32), starts, 7)
    found = segment(windows, starts, sub_actions=8, actions=2, decoder=decoder)
    assert set(found.path) == {found.path[0]}

"""The answer to "was it worth it?": its words on invented scores, and the whole command on tiny runs."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from contrastive.augment.views import Views, center_view
from contrastive.config import DataConfig, PretrainConfig
from contrastive.config_files import load_saved
from contrastive.data.dataset import open_dataset
from contrastive.encoders.weights import load_encoder
from eval import knn, linear_probe, lowshot
from eval.__main__ import main
from eval.features import PartFeatures
from eval.knn import KnnConfig, KnnEvaluation
from eval.linear_probe import LinearConfig, LinearEvaluation
from eval.lowshot import LowshotConfig, LowshotEvaluation
from eval.protocol import compare
from eval.report.read import read_run
from eval.scores import accuracy_line, unseen_share
from eval.stats import found_again
from eval.verdict import judge, judge_row, judge_without_labels
from eval.worth import PROTOCOL, WorthEvaluation, _class_folders, _warn_of_duplicates, score
from tests import tiny


def row(name, **gains):
    """Return a row of scores; each gain is (value, low, high) in points."""
    number = {"value": 0.9, "low": 0.8, "high": 1.0}
    baselines = {
        which: number
        | {"gain": dict(zip(("value", "low", "high"), (each / 100 for each in gain), strict=True))}
        for which, gain in gains.items()
    }
    return {"name": name, "interval": "Wilson", "encoder": number} | baselines


WIN, LEVEL, LOSS = (3.0, 1.0, 5.0), (0.5, -1.0, 2.0), (-2.0, -3.0, -1.0)


BOTH = {"raw_pixels": WIN, "random_encoder": WIN}
NEITHER = {"raw_pixels": LEVEL, "random_encoder": WIN}
BEHIND = {"raw_pixels": LOSS, "random_encoder": WIN}


@pytest.mark.parametrize(
    ("answer", "linear", "neighbours", "one", "ten"),
    [
        ("worth it", BOTH, BOTH, BOTH, BOTH),
        ("worth it", BOTH, NEITHER, NEITHER, NEITHER),
        ("worth it", NEITHER, NEITHER, NEITHER, BOTH),
        ("worth it in part", NEITHER, BOTH, BOTH, NEITHER),  # neither with many labels nor with ten
        ("worth it in part", BOTH, BEHIND, NEITHER, BOTH),
        ("worth it in part", BOTH, NEITHER, BEHIND, NEITHER),
        ("not worth it yet", BOTH, BEHIND, BEHIND, NEITHER),  # ahead once, behind twice
        ("not worth it yet", NEITHER, NEITHER, NEITHER, NEITHER),
        ("not worth it yet", NEITHER, BEHIND, NEITHER, NEITHER),
    ],
)
def test_worth_it_is_ahead_with_many_or_ten_labels_and_behind_nowhere(answer, linear, neighbours, one, ten):
    names = ("linear probe", "kNN k=20", "1 label a class", "10 labels a class")
    rows = zip(names, (linear, neighbours, one, ten), strict=True)
    found = judge([row(name, **gains) for name, gains in rows])
    assert found.answer == answer
    assert found.sentence.startswith(f"{answer.capitalize()}: ")
    assert found.sentence.endswith("over the best baseline.") is (answer == "worth it")  # else an advice


def test_each_verdict_counts_its_rows_and_names_the_baseline_that_is_ahead():
    rows = [
        row("linear probe", raw_pixels=WIN, random_encoder=(4.0, 2.0, 6.0)),
        row("kNN k=20", raw_pixels=(-43.0, -50.0, -36.0), random_encoder=WIN),
        row("1 label a class", raw_pixels=LEVEL, random_encoder=(-60.0, -200.0, 80.0)),
        row("10 labels a class", raw_pixels=(-60.0, -200.0, 80.0), random_encoder=LOSS),
        row("5 labels a class", raw_pixels=WIN, random_encoder=WIN),
    ]
    assert judge(rows).sentence.startswith(
        "Worth it in part: ahead of raw pixels and the random encoder on 2 of 5: linear probe (+3.0) and "
        "5 labels a class (+3.0); level with the best of them on 1 of 5: 1 label a class (-60.0); behind on "
        "2 of 5: kNN k=20 (-43.0 against raw pixels) and 10 labels a class (-2.0 against the random encoder)"
        ". Numbers are points of accuracy that ours gains over the best baseline. Train longer"
    )
    assert "under another run.name" in judge(rows).sentence
    alone = judge([row("kNN k=20", **BOTH)])  # of classes with a label each
    assert alone.answer == "worth it in part"
    assert alone.sentence.endswith("More labelled images, more than 10 a class, would tell more.")


@pytest.mark.parametrize(
    ("gains", "words", "advice"),
    [
        (
            {"raw_pixels": LEVEL, "random_encoder": WIN},
            "level with the best of raw pixels and the",
            "views.png",
        ),
        (
            {"raw_pixels": WIN, "random_encoder": LOSS},
            "(-2.0 against the random encoder)",
            "Train longer under another run.name",
        ),
        (
            {"raw_pixels": WIN, "random_encoder": WIN, "starting_weights": LOSS},
            "(-2.0 against the weights it started from)",
            "Training loses what these weights know",
        ),
        (
            {"raw_pixels": WIN, "random_encoder": WIN, "torchvision-resnet18-a": LOSS},
            "(-2.0 against torchvision-resnet18-a)",
            "encoder.weights",
        ),
    ],
)
def test_ahead_nowhere_is_not_worth_it_yet_and_names_a_setting(gains, words, advice):
    found = judge([row("linear probe", **gains)])
    assert found.answer == "not worth it yet"
    assert found.sentence.startswith("Not worth it yet: ")
    assert words in found.sentence
    assert advice in found.sentence


@pytest.mark.parametrize(
    ("pixels", "random", "stands"),
    [
        (0.1, 0.2, "ahead of raw pixels and the random encoder"),
        (0.01, 0.2, "level with the best of raw pixels and the random encoder"),
        (0.1, -0.2, "behind the random encoder"),
    ],
)
def test_one_row_is_judged_in_the_words_of_all(pixels, random, stands):
    gains = {
        name: {"value": 0.5, "gain": {"value": gain, "low": gain - 0.05, "high": gain + 0.05}}
        for name, gain in (("raw_pixels", pixels), ("random_encoder", random))
    }
    row = {"name": "R@1", "encoder": {"value": 0.6}, **gains}
    low, high = 100 * pixels - 5, 100 * pixels + 5
    assert judge_row(row).startswith(
        f"R@1: {stands}; in points, with 95% intervals, ours gains {100 * pixels:+.1f} "
        f"({low:+.1f} to {high:+.1f}) over raw pixels and "
    )
    gains["raw_pixels"]["value"] = 1.0
    gains["random_encoder"]["gain"] = {"value": 0.0, "low": -0.1, "high": 0.1}
    assert "R@1: a baseline at 100% leaves nothing to gain" in judge_row(row | gains)
    gains["raw_pixels"]["gain"] = {"value": -0.4, "low": -0.5, "high": -0.3}
    assert judge_row(row | gains).startswith("R@1: behind raw pixels; ")
    wide = {"raw_pixels": {"value": 0.5, "gain": {"value": 0.0, "low": -0.7, "high": 0.7}}}
    assert judge_row({"name": "R@1", "encoder": {"value": 0.5}} | wide).startswith("R@1: too few to tell; ")
    assert judge_row({"name": "R@1", "encoder": {"value": 0.6}}) == ""


def test_where_no_network_beats_naming_the_largest_class_the_classes_are_doubted():
    rows = [row("linear probe", **NEITHER), row("kNN k=20", **NEITHER)]  # intervals from 80.0%
    told = judge(rows, 0.805).sentence
    assert "No network is seen to beat always naming the largest class (80.5%)" in told
    assert "data.name=images" in told
    assert "rain longer" not in told
    rows[1]["raw_pixels"]["low"] = 0.81
    for largest in (0.805, None):
        assert "rain longer" in judge(rows, largest).sentence
        assert "largest class" not in judge(rows, largest).sentence


def test_the_sentence_says_what_was_pretrained_on():
    told = judge([row("linear probe", **BOTH)], pretrained="9 of 9 test images were pretrained on").sentence
    assert ". Not of unseen images: 9 of 9 test images were pretrained on. Numbers" in told
    assert "unseen" not in judge([row("linear probe", **BOTH)]).sentence


def test_few_test_images_do_not_tell():
    """One draw of labels has no interval at all, four images one of 70 points: nothing is shown by them."""
    wide = row("linear probe", raw_pixels=(25.0, -54.6, 104.6), random_encoder=WIN)
    endless = row("kNN k=20", raw_pixels=(2.0, -float("inf"), float("inf")), random_encoder=WIN)
    found = judge([wide, endless])
    assert found.answer == "not known"
    assert found.sentence.endswith("There are too few test images to tell: label more.")
    assert judge([wide, row("kNN k=20", **NEITHER)]).answer == "not known"  # the probe decides
    assert judge([row("linear probe", **NEITHER), endless]).answer == "not worth it yet"
    assert judge([wide, row("kNN k=20", **BEHIND)]).answer == "not worth it yet"


@pytest.mark.parametrize(
    ("images", "answer", "advice"),
    [(60, "not worth it yet", "Train longer"), (20, "not known", "There are too few test images to tell")],
)
def test_equal_hits_on_every_image_are_level_if_the_images_are_many(images, answer, advice):
    """Of 60 images 6% may differ unseen, of 20 images 17%: more than a verdict allows."""
    line = accuracy_line("linear probe", torch.arange(images)[None] > 0)
    found = judge(compare({"encoder": [line], "raw_pixels": [line], "random_encoder": [line]}))
    assert found.answer == answer
    assert "level with the best of raw pixels and the random encoder on 1 of 1" in found.sentence
    assert advice in found.sentence


def test_a_head_that_cannot_see_order_gains_nothing_over_shuffled_frames():
    ours, pixels = (accuracy_line("linear probe", torch.arange(60)[None] > wrong) for wrong in (2, 40))
    rows = compare({"encoder": [ours], "raw_pixels": [pixels], "shuffled_frames": [ours]})
    found = judge(rows)
    assert found.answer == "worth it"
    assert "Time adds to its linear probe: +0.0 over ours on shuffled frames." in found.sentence
    assert "encoder.temporal=nuta" in found.sentence


def test_less_of_a_video_is_no_rival():
    """A mean over frames does not see their order: it cannot gain over shuffled ones, and need not."""
    same = (0.0, -60.0, 60.0)  # of four clips, none of which differs
    found = judge([row("linear probe", **BOTH, single_frame=LOSS, shuffled_frames=same)])
    assert found.answer == "worth it"
    assert found.sentence.startswith("Worth it: ahead of raw pixels and the random encoder on 1 of 1")
    assert (
        "Time adds to its linear probe: -2.0 over ours on one frame and +0.0 over ours on shu"
        in found.sentence
    )
    assert "encoder.temporal=nuta" in found.sentence
    seen = judge([row("linear probe", **BOTH, single_frame=WIN, shuffled_frames=WIN)])
    assert seen.sentence.endswith("+3.0 over ours on one frame and +3.0 over ours on shuffled frames.")


def test_a_baseline_at_100_percent_leaves_nothing_to_gain():
    full = row("kNN k=20", raw_pixels=LOSS, random_encoder=WIN)
    full["raw_pixels"]["value"] = 1.0
    found = judge([full])
    assert found.answer == "not known"
    assert "100% leaves nothing to gain on 1 of 1: kNN k=20 (-2.0 against raw pixels)" in found.sentence
    assert "longer" not in found.sentence

    beatable = row("linear probe", raw_pixels=WIN, random_encoder=LEVEL)
    found = judge([full, beatable])
    assert found.answer == "not worth it yet"
    assert "Train longer" in found.sentence  # of the row that can be won
    found = judge([full, row("linear probe", raw_pixels=WIN)])
    assert found.answer == "worth it in part"
    assert found.sentence.endswith("Compare on images where the baselines err.")

    given = signals(gain_low=-0.1, gain=0.0)
    given["random_encoder"]["retrieval"] = 1.0
    found = judge_without_labels(given, 200)
    assert found.answer == "not known"
    assert "nothing is left to gain over the random encoder" in found.sentence


def signals(verdict="healthy", gain_low=0.1, gain=0.5, retrieval=0.9):
    ours = {"retrieval": retrieval, "rankme": 31.0, "dimensions": 64, "verdict": verdict}
    other = {
        "retrieval": retrieval - gain,
        "gain": gain,
        "gain_low": gain_low,
        "rankme": 9.0,
        "dimensions": 64,
    }
    return {"encoder": ours, "raw_pixels": other | {"gain": gain + 0.1}, "random_encoder": other}


@pytest.mark.parametrize(
    ("given", "answer", "words"),
    [
        (signals(), "not known", ["90.0% of the second views", "the random encoder 40.0%", "imagefolder"]),
        (signals(), "not known", ["better than the random encoder does", "much alike"]),
        (
            signals(retrieval=0.117, gain=0.06, gain_low=0.03),
            "not known",
            ["better than the random encoder does", "cannot say"],
        ),
        (signals(gain_low=-0.1, gain=0.0), "not known", ["no better than the random encoder", "much alike"]),
        (
            signals("complete collapse"),
            "not worth it yet",
            ["complete collapse of the features", "temperature"],
        ),
    ],
)
def test_without_labels_training_can_be_seen_to_fail_only(given, answer, words):
    found = judge_without_labels(given, 200)
    assert found.answer == answer
    assert found.sentence.lower().startswith(answer)
    assert "effective rank 31.0 of 64" in found.sentence
    assert all(text in found.sentence for text in words)
    assert not any(text in found.sentence.lower() for text in ("poor", "train longer"))
    assert judge_without_labels(given, 200, "There are folders.").sentence.endswith(" There are folders.")


def test_a_collapse_on_other_images_than_the_runs_own_is_no_failure_of_training():
    found = judge_without_labels(signals("complete collapse"), 200, own=False)
    assert found.answer == "not known"
    assert "not the run's own" in found.sentence
    assert "temperature" not in found.sentence


def test_folders_that_may_be_classes_are_named_with_the_settings_that_read_them(tmp_path):
    root = tmp_path / "weather icons"
    own = DataConfig(name="images", root=str(root))
    tiny.write_images(root / "a", 6)
    images = open_dataset(own).train
    assert _class_folders(images, own) == ""
    tiny.write_images(root / "b", 6)
    told = f"add data.name=imagefolder 'data.root={root}'."
    assert _class_folders(images, own) == f"{root} has 2 folders of images; if they are classes, {told}"
    tiny.write_images(root, 3)
    assert _class_folders(images, own).endswith(
        f"move the 3 images that lie in none of them there or away, and {told}"
    )
    assert _class_folders(images, replace(own, name="imagefolder")) == ""


def test_a_view_is_found_if_it_is_closer_than_all_others():
    first = F.normalize(torch.randn(1500, 4, generator=torch.Generator().manual_seed(0)))
    second = F.normalize(first + 0.05 * torch.randn(1500, 4, generator=torch.Generator().manual_seed(1)))
    expected = [bool((a @ second.T).argmax() == at) for at, a in enumerate(first)]
    assert found_again(first, second).tolist() == expected
    assert 0 < sum(expected) < 1500
    same = torch.ones(3, 4) / 2
    assert not found_again(same, same).any()  # collapsed


def test_its_numbers_are_those_of_the_protocols_it_runs(clusters):
    config = WorthEvaluation("x", seeds=3)
    lines = {line.name: line for line in score(clusters, config).lines}
    few = LowshotEvaluation("x", seeds=3, lowshot=LowshotConfig([1, 5, 10], []))
    expected = [
        linear_probe.score(clusters, LinearEvaluation("x")).lines[0],
        knn.score(clusters, KnnEvaluation("x", knn=KnnConfig([20]))).lines[0],
        *lowshot.score(clusters, few).lines,
    ]
    names = ["linear probe", "kNN k=20", "1 label a class", "5 labels a class", "10 labels a class"]
    assert [*lines] == names
    for name, line in zip(names, expected, strict=True):
        assert (lines[name].value, lines[name].low, lines[name].high) == (line.value, line.low, line.high)


@pytest.mark.parametrize(("most", "told"), [(19, 0), (20, 1)])
def test_copies_across_the_split_are_warned_of_where_images_are_few(most, told, monkeypatch):
    monkeypatch.setattr("eval.worth._MOST_COMPARED", most)
    pixels = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    pixels[15] = pixels[3]
    parts = {
        name: PartFeatures(own, torch.zeros(10, dtype=torch.int64), torch.arange(10))
        for name, own in zip(("train", "test"), pixels.split(10), strict=True)
    }
    found = _warn_of_duplicates(parts, parts, torch.device("cpu"))
    assert [text.startswith("1 pair of near-duplicates with one image in") for text in found] == [True] * told


def test_what_guessing_scores_is_said():
    given = {"scores": [], "data": {"classes": [*"abcde"]}, "details": {"encoder": {}}, "sentence": "Yes."}
    assert "chance: guessing among 5 classes has 20.0%" in PROTOCOL.notes(given)  # without a linear probe
    given["details"]["encoder"]["confusion"] = [[1, 2, 0, 0, 0], [5, 0, 0, 0, 0], *[[0] * 5] * 3]
    told = "chance: guessing among 5 classes has 20.0%, always naming the largest class 62.5%"
    assert told in PROTOCOL.notes(given)


def test_labels_that_a_class_does_not_have_are_left_out(clusters):
    keep = torch.cat([(clusters.train.labels == label).nonzero()[: 4 + 20 * label, 0] for label in range(6)])
    small = type(clusters)(clusters.train.take(keep), clusters.test, clusters.classes)
    found = score(small, WorthEvaluation("x"))
    assert [line.name for line in found.lines] == ["linear probe", "kNN k=20", "1 label a class"]
    (told,) = [text for text in found.warnings if "labels_per_class" in text]
    assert told == "worth.labels_per_class=[5, 10]: left out, class 'a' has 4 training images"


def started_from(run, weights):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("weights: null", f"weights: {weights}"))


def test_with_one_label_a_class_the_probe_at_all_labels_is_left_out(clusters):
    first = torch.stack([(clusters.train.labels == label).nonzero()[0, 0] for label in range(6)])
    single = type(clusters)(clusters.train.take(first), clusters.test, clusters.classes)
    found = score(single, WorthEvaluation("x"))
    assert [line.name for line in found.lines] == ["kNN k=6", "1 label a class"]
    assert any("no class has 2" in text for text in found.warnings)


def test_one_table_and_one_sentence_with_labels(new_run, capsys, monkeypatch):
    short = partial(LinearEvaluation, linear=LinearConfig(min_steps=20, epochs=1))
    monkeypatch.setattr("eval.worth.LinearEvaluation", short)  # its numbers are tested above
    run = new_run()
    started_from(run, run / "encoder.safetensors")
    (run / "metrics.csv").write_text("step,epoch,train/loss\n34,3.4,0.5\n")
    given = [f"checkpoint={run}", "device=cpu", "progress=false", "seeds=2", "worth.labels_per_class=[1]"]
    assert main(["worth", *given, "worth.against=[timm:test_resnet:random]"]) == 0
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    result = json.loads((run / "eval" / "worth.json").read_text())
    networks = ["encoder", "raw_pixels", "random_encoder", "starting_weights", "timm:test_resnet:random"]
    assert [*short["scores"]["linear probe"]] == networks
    assert short["answer"] == result["answer"] == "not worth it yet"  # nobody trained it
    assert short["sentence"] == result["sentence"]
    lines = told.err.splitlines()
    assert lines[0].split("  ")[-1].strip() == "1 label a class"
    titles = [
        "raw pixels",
        "the random encoder",
        "the weights it started from",
        "timm:test_resnet:random",
    ]
    assert [line.strip().startswith(name) for line, name in zip(lines[1:], titles, strict=False)] == [
        True
    ] * 4
    assert lines[5].strip().startswith("ours ")
    assert result["sentence"] in lines
    unfinished = (
        "the run has done 3.4 of 200 epochs, not finished; the command that began it continues it, and its "
        "answer may then be another"
    )
    assert unfinished in result["warnings"]
    assert f"warning: {unfinished}" in lines
    reach = unseen_share(result["data"]["rows"]["test"])
    for number in result["scores"]:  # the starting weights are the same file
        assert number["starting_weights"]["gain"] == {"value": 0.0, "low": -reach, "high": reach}
        assert number["timm:test_resnet:random"]["value"] != number["random_encoder"]["value"]

    shown = read_run(run, "own")  # by the report
    assert shown.own.answer.sentence == result["sentence"]
    assert [line[0] for line in shown.own.answer.table] == ["", *titles, "ours"]
    assert shown.own.results["worth"].scores[0].value == result["scores"][0]["encoder"]["value"]
    assert main(["report", str(run), "device=cpu", "progress=false"]) == 0
    page = (run / "report.html").read_text()
    assert "Was it worth it?" in page.partition("How good are the features?")[0]
    assert result["sentence"] in page
    assert page.count("kNN k=20</td>") == 1


def test_without_labels_it_says_what_can_be_said(new_run, tmp_path, capsys):
    from PIL import Image

    noise = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        pixels = torch.randint(0, 255, (20, 20, 3), dtype=torch.uint8, generator=noise)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number:02}.png")
    run = new_run(name="images", root=str(tmp_path / "photos"))
    started_from(run, "default")
    assert main(["worth", f"checkpoint={run}", "device=cpu", "progress=false"]) == 0
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    result = json.loads((run / "eval" / "worth.json").read_text())
    assert short["answer"] in ("not known", "not worth it yet")
    assert short["sentence"] in told.err
    assert "among 12 images (raw pixels " in short["sentence"]
    (warning,) = result["warnings"]
    assert "the run started from encoder.weights=default, which is no file here" in warning
    assert [name for name, each in result["scores"].items() if "verdict" in each] == ["encoder"]

    saved = load_saved(PretrainConfig, run / "config.yaml")
    images, (encoder, _) = open_dataset(saved.data).train, load_encoder(run / "encoder.safetensors")
    pixels = torch.stack([images.read(number) for number in range(12)])
    with torch.no_grad():
        first, second = (
            F.normalize(encoder(view))
            for view in Views(saved.augment, saved.data, 0)(pixels, torch.arange(12), 0)
        )
        centre = encoder(center_view(pixels, saved.data))
    ours = result["scores"]["encoder"]
    assert ours["retrieval"] == pytest.approx(found_again(first, second).float().mean().item(), abs=1e-6)
    assert ours["dimensions"] == centre.shape[1]
    assert ours["retrieval"] - result["scores"]["raw_pixels"]["retrieval"] == pytest.approx(
        result["scores"]["raw_pixels"]["gain"], abs=1e-6
    )
    shown = read_run(run, "own")
    assert shown.own.answer.sentence == result["sentence"]
    assert "worth" not in shown.own.results  # no accuracies


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "worth.against=[torchvision:resnet18:random,torchvision:resnet18:random]",
            "resnet18:random is compared with already",
        ),
        ("worth.against=[/nowhere]", "checkpoint=/nowhere: does not exist"),
        ("worth.labels_per_class=[5,1]", "labels_per_class=[5, 1]: give ascending numbers"),
        ("worth.k=0", "worth.k=0: allowed is 1 or more"),
        ("worth.rows=1", "worth.rows=1: allowed is 2 or more"),
    ],
)
def test_wrong_settings_are_refused(setting, message, shared_run, capsys):
    assert main(["worth", f"checkpoint={shared_run}", "device=cpu", "progress=false", setting]) == 2
    assert message in capsys.readouterr().err


def test_a_network_for_another_size_is_refused(shared_run, new_run, capsys):
    other = new_run(image_size=32)
    given = [f"checkpoint={shared_run}", "device=cpu", f"worth.against=[{other}]"]
    assert main(["worth", *given]) == 2
    assert "takes images of 32 px, the encoder 16 px" in capsys.readouterr().err

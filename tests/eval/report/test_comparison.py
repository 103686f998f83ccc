import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from contrastive.config import DataConfig, PretrainConfig
from contrastive.config_files import load_saved, to_yaml
from eval.__main__ import main
from tests.eval.conftest import add_pictures, make_run
from tests.eval.report.test_sections import Page

CURVE, BAR, MARK = "1.8", "8", "3"  # widths of their lines
BASELINES = ("raw_pixels", "random_encoder")
CLIPS = (*BASELINES, "single_frame", "shuffled_frames")


def tagged(page, tag):
    """Texts of all elements of a name."""
    return [text for name, text in page.texts if name == tag]


def strokes(page):
    """(width, colour) of all lines."""
    lines = [given for tag, given in page.tags if tag == "path"]
    return {(line["stroke-width"], line["stroke"].removeprefix("var(--").rstrip(")")) for line in lines}


def data_of(run, root=None):
    """``data`` of a result on the run's own images, or on those of another folder."""
    config = run / "config.yaml"
    own = load_saved(PretrainConfig, config).data if config.is_file() else DataConfig(name="digits")
    return {
        "name": "imagefolder" if root else own.name,
        "root": root or own.root,
        "classes": ["0", "1"],
        "rows": {"train": 9, "test": 8},
        "fingerprint": {"test": root or own.root or own.name},
        "test_part": "the data set's own",
    }


def add_scores(run, value, protocol="knn", name="top1 <k=5>", *, root=None, place="eval", others=BASELINES):
    """A result as the command writes it, as far as the page reads it."""
    number = {"value": value, "low": value - 0.02, "high": value + 0.02}
    baseline = number | {"gain": {"value": 0.0, "low": -0.02, "high": 0.02}}
    row = {"name": name, "interval": "Wilson", "encoder": number}
    result = {
        "protocol": protocol,
        "answer": "worth it",
        "sentence": "Worth it: it is.",
        "scores": [row | dict.fromkeys(others, baseline)],
        "warnings": [],
        "details": {"encoder": {"confusion": [[3, 1], [0, 4]]}},
        "data": data_of(run, root),
        "encoder_sha256": "abc" + run.name,
    }
    (run / place).mkdir(parents=True, exist_ok=True)
    (run / place / f"{protocol}.json").write_text(json.dumps(result))


def sha256_of(run):
    return hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def compared(tmp_path, capsys):
    """Writes the page by the command line; returns its JSON, its HTML and its text."""

    def call(*paths):
        assert main(["report", *map(str, paths), f"out={tmp_path / 'out'}"]) == 0
        told = capsys.readouterr()
        result = json.loads(told.out)
        assert told.err.splitlines()[-1] == f"report: {result['file']}"
        text = Path(result["file"]).read_text()
        page = Page()
        page.feed(text)
        assert page.open == []
        return result, text, page

    return call


@pytest.fixture
def runs(tmp_path):
    made = make_run(tmp_path / "one"), make_run(tmp_path / "<two>", mean=[0.5, 0.3, 0.3])
    for run, value in zip(made, (0.912, 0.873), strict=True):
        add_pictures(run)
        add_scores(run, value)
    return made


@pytest.fixture
def alone(tmp_path):
    """A run whose data is gone, so that its page has no map: quick."""
    run = make_run(tmp_path / "alone", name="imagefolder", root="/nowhere/at/all")
    add_scores(run, 0.9)
    return run


def test_results_of_an_earlier_encoder_are_marked(runs, alone, compared):
    assert "one: Of an earlier encoder: knn; evaluate again." in " ".join(compared(*runs)[2].text)
    for run in runs:
        file = run / "eval" / "knn.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_sha256": sha256_of(run)}))
    assert "earlier encoder" not in " ".join(compared(*runs)[2].text)

    add_scores(alone, 0.9, protocol="worth")
    file = alone / "eval" / "worth.json"
    answer = json.loads(file.read_text())
    for made_of, told in (("earlier", True), (sha256_of(alone), False)):
        file.write_text(json.dumps(answer | {"encoder_sha256": made_of}))
        words = " ".join(compared(alone)[2].text)
        assert "Worth it: it is." in words
        assert ("Of an earlier encoder, evaluate again. Worth it: it is." in words) is told
        assert ("Of an earlier encoder: worth, knn; evaluate again." in words) is told


@pytest.mark.parametrize(
    ("answer", "warnings", "told"),
    [
        ("worth it", ["no score is clearly above"], True),
        ("worth it in part", ["no score is clearly above"], True),
        ("not worth it yet", ["no score is clearly above"], False),
        ("worth it", [], False),
    ],
)
def test_an_evaluation_that_disagrees_with_a_warning_of_training_decides(
    alone, compared, answer, warnings, told
):
    (alone / "summary.json").write_text(json.dumps({"warnings": warnings}))
    add_scores(alone, 0.9, protocol="worth")
    file = alone / "eval" / "worth.json"
    sha256 = sha256_of(alone)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"answer": answer, "encoder_sha256": sha256}))
    words = " ".join(compared(alone)[2].text)
    assert ("the evaluation below is later and decides" in words) is told
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_sha256": "earlier"}))
    assert "is later and decides" not in " ".join(compared(alone)[2].text)


def test_the_probe_of_worth_has_no_second_tile(alone, compared):
    add_scores(alone, 0.951, protocol="worth")
    file = alone / "eval" / "worth.json"
    answer = json.loads(file.read_text())
    answer["scores"][0]["random_encoder"]["gain"]["value"] = -0.5
    file.write_text(json.dumps(answer))
    assert "top1 <k=5>, -50.0 over the best baseline" in compared(alone)[2].text
    add_scores(alone, 0.951, protocol="linear")
    found = compared(alone)[2].text
    assert "top1 <k=5>, -50.0 over the best baseline" not in found
    assert {"linear probe, top1 <k=5>", "nearest neighbours, top1 <k=5>"} <= {*found}


def test_every_network_has_a_column_a_mark_and_its_name_and_no_control_is_a_baseline(alone, compared):
    add_scores(alone, 0.5, protocol="worth", name="linear probe", others=CLIPS)
    add_scores(alone, 0.5, protocol="linear", others=(*BASELINES, "timm:x:FILE"))
    file = alone / "eval" / "worth.json"
    answer = json.loads(file.read_text())
    answer["scores"][0]["single_frame"]["gain"]["value"] = -0.5
    file.write_text(json.dumps(answer))
    page = compared(alone)[2]
    clips = ["raw pixels", "the random encoder", "ours on one frame", "ours on shuffled frames"]
    heads = [text for text in tagged(page, "th") if text != "0 to 100%"]
    second = [*clips[:2], "timm:x:FILE"]  # of the protocols in the second table
    assert heads == ["ours", *clips, "score, %", "ours", *second]
    legends = [text for text in tagged(page, "span") if text.strip()]
    assert [text for text in legends if text in (*clips, *second)] == [*clips, *second]
    marks = [given["stroke"] for tag, given in page.tags if tag == "path" and given["stroke-width"] == MARK]
    colours = [f"var(--s{number})" for number in (1, 2, 3, 4, 1, 2, 3, 1, 2)]  # kNN has no third
    assert marks == colours
    assert any(given.get("class") == "many" for tag, given in page.tags if tag == "table")
    (alone / "eval" / "linear.json").unlink()
    fact = "linear probe, +0.0 over the best baseline"
    assert fact in compared(alone)[2].text
    file.write_text(json.dumps(answer | {"pretrained": {"count": 8, "scored": 9}}))
    assert f"{fact} (8 of 9 test images were pretrained on)" in compared(alone)[2].text


def test_scores_on_images_that_a_run_was_pretrained_on_are_marked_beside_others(runs, compared):
    file = runs[1] / "eval" / "knn.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pretrained": {"count": 8, "scored": 9}}))
    told = " ".join(compared(*runs)[2].text)
    assert told.count("8 of 9 test images were pretrained on.") == 1
    assert f"{runs[1].name}: Nearest neighbours: 8 of 9 test images" in told


def test_each_protocol_names_the_images_it_is_of(alone, compared):
    add_scores(alone, 0.9, protocol="linear")
    add_scores(alone, 0.9, protocol="retrieval")
    texts = [text for text in compared(alone)[2].text if "images of /nowhere" in text]
    assert texts == [
        f"{parts} images of /nowhere/at/all, test part: the data set's own"
        for parts in ("9 training and 8 test", "9 gallery and 8 query")
    ]


def test_results_on_other_images_are_named_beside_those_on_the_runs_own(alone, compared):
    add_scores(alone, 0.5, protocol="worth", name="linear probe")
    add_scores(alone, 0.75, protocol="worth", name="linear probe", root="/data/sorted", place="eval/on-a")
    add_scores(alone, 0.25, protocol="linear", root="/data/sorted", place="eval/on-a")
    add_scores(alone, 0.125, root="/data/sorted", place="eval/on-a")
    add_scores(alone, 0.625, root="/more/sorted", place="eval/on-b")
    page = compared(alone)[2]
    facts = dict(zip(*(tagged(page, tag) for tag in ("dt", "dd")), strict=True))
    assert facts == {
        "linear probe, +0.0 over the best baseline": "50.0%",
        "nearest neighbours, top1 <k=5>": "90.0%",
        "linear probe, top1 <k=5> on imagefolder /data/sorted": "25.0%",  # there is none on the run's own
    }
    headings = [text for text in tagged(page, "h2") if "worth" in text]
    assert headings == ["Was it worth it?", "Was it worth it on imagefolder /data/sorted?"]
    names = [text.strip() for text in page.text if text.startswith("Nearest neighbours")]
    assert names == [
        f"Nearest neighbours{on}"
        for on in ("", " on imagefolder /data/sorted", " on imagefolder /more/sorted")
    ]
    assert {"eval/knn.json", "eval/on-a/knn.json", "eval/on-b/knn.json"} <= {*page.text}


def test_a_result_by_the_former_name_of_its_protocol_is_read_until_there_is_a_new_one(alone, compared):
    heading = "Linear probe, SGD on random views"
    add_scores(alone, 0.25, protocol="linear-sgd_augmented")
    page = compared(alone)[2]
    assert heading in [text.strip() for text in page.text]
    assert {"25.0%", "eval/linear-sgd_augmented.json"} <= {*page.text}
    add_scores(alone, 0.75, protocol="linear_sgd")
    page = compared(alone)[2]
    assert [text.strip() for text in page.text].count(heading) == 1
    assert {"75.0%", "eval/linear_sgd.json"} <= {*page.text}
    assert "25.0%" not in page.text


def test_a_result_that_an_earlier_version_wrote_over_the_runs_own_is_named_too(alone, compared):
    add_scores(alone, 0.75, protocol="worth", name="linear probe", root="/data/sorted")
    page = compared(alone)[2]
    assert "linear probe, +0.0 over the best baseline on sorted" in page.text
    assert "Was it worth it on sorted?" in page.text
    add_scores(
        alone, 0.5, protocol="worth", name="linear probe", root="/data/sorted", place="eval/on-sorted-1"
    )
    texts = compared(alone)[2].text
    assert texts.count("Was it worth it on sorted?") == 1  # the later one
    assert "50.0%" in texts


def test_a_result_keeps_the_place_of_its_images_wherever_their_root_leads_now(alone, compared):
    add_scores(alone, 0.75, root="/data/sorted", place="eval/on-a")
    file = alone / "eval" / "on-a" / "knn.json"
    result = json.loads(file.read_text())

    named = ["Nearest neighbours", "Nearest neighbours on lab"]

    def titles(data):
        file.write_text(json.dumps(result | {"data": data}))
        return [name for text in compared(alone)[2].text if (name := text.strip()) in named]

    assert titles(data_of(alone) | {"other": "images /data/lab"}) == named
    assert titles(result["data"] | {"other": ""}) == named[:1]
    assert "75.0%" in compared(alone)[2].text  # the later of two on the same images


def test_runs_are_compared_on_images_that_they_share_whosever_they_are(runs, alone, compared):
    for run, value in ((runs[0], 0.5), (runs[1], 0.625), (alone, 0.75)):
        add_scores(run, value, root="/shared", place="eval/on-shared-1")
    page = compared(*runs, alone)[2]
    words = " ".join(page.text)
    assert "do not compare (" not in words
    assert [text for text in page.text if text.startswith("9 training and 8 test images of")] == [
        f"9 training and 8 test images of {name}, test part: the data set's own"
        for name in ("digits", "/shared")
    ]
    assert page.text.count("Nearest neighbours: top1 <k=5>") == 2
    assert words.index("91.2") < words.index("87.3") < words.index("50.0") < words.index("75.0")


def test_numbers_stand_once_and_their_bars_begin_at_0(alone, compared):
    add_scores(alone, 0.5, protocol="worth", name="linear probe")
    add_scores(alone, 0.75, protocol="lowshot", name="top1 at 100%")
    page = compared(alone)[2]
    assert page.text.count("linear probe") == 1  # in the answer's table, not again below it
    assert "Beside the baselines" not in page.text
    assert page.text.count("0 to 100%") == 2
    bars = [given["d"] for tag, given in page.tags if tag == "path" and given["stroke-width"] == BAR]
    assert bars == [f"M4.0 11.0L{4 + 252 * value:.1f} 11.0" for value in (0.5, 0.9, 0.75)]
    assert "settings by a fixed rule; the linear probe chooses its own" in " ".join(page.text)


def test_health_without_labels_stands_once(alone, compared):
    number = dict.fromkeys(("retrieval", "rankme", "dimensions", "alignment", "uniformity", "std"), 0.25)
    number |= {"retrieval_low": 0.125, "retrieval_high": 0.375}
    gain = {"gain": 0.0, "gain_low": -0.125, "gain_high": 0.125}
    scores = {"encoder": number, "raw_pixels": number | gain, "random_encoder": number | gain}
    data = data_of(alone) | {"classes": []}
    unlabelled = {"answer": "not known", "sentence": "Not known.", "scores": scores, "data": data}
    (alone / "eval" / "worth.json").write_text(json.dumps(unlabelled))
    texts = compared(alone)[2].text
    assert {"second views found, %", "effective rank of the training features (RankMe)"} <= {*texts}
    words = " ".join(texts)
    for cell in ("25.0  (12.5 to 37.5)", "25.0  (+0.0: -12.5 to 12.5)", "0.2 of 0.25"):
        assert cell in words
    assert "alignment" not in words  # by itself the best is a collapse
    duplicates = {"pairs": 0, "listed": 0, "file": "near_duplicates.csv"}
    stats = {"scores": scores, "near_duplicates": duplicates, "data": data}
    (alone / "eval" / "stats.json").write_text(json.dumps(stats))
    texts = compared(alone)[2].text
    assert texts.count("effective rank of the training features (RankMe)") == 1
    assert "No near-duplicates." in texts


def test_a_path_may_hold_any_character(runs, compared, tmp_path):
    named = runs[1].rename(tmp_path / "zwei 😀")
    assert compared(runs[0], named)[0]["runs"] == ["one", "zwei 😀"]


def test_another_comparison_gets_another_file_and_the_same_one_its_own(runs, tmp_path, compared):
    other = make_run(tmp_path / "elsewhere" / "one")
    pages = [compared(*each)[0]["file"] for each in (runs, [*runs, runs[0]], [other, runs[1]], runs)]
    assert pages[0] == pages[3]
    assert len({*pages}) == len([*(tmp_path / "out").iterdir()]) == 3
    assert Path(pages[0]).name.startswith("comparison-one-<two>-")
    long = [make_run(tmp_path / ("ü" * 100 + str(number))) for number in range(2)]
    compared(*long)


def test_scores_curves_and_differences_of_all_runs(runs, compared):
    result, text, page = compared(*runs)
    assert result["runs"] == ["one", "<two>"]
    words = " ".join(page.text)
    for expected in (
        "91.2",
        "87.3",
        "89.2–93.2",
        "95% intervals: Wilson.",
        "top1 <k=5>",
        "Loss",
        "Similarity to the query: positive",
    ):
        assert expected in words
    assert "<two>" in page.text
    assert "<two>" not in text
    assert "data.mean" in words
    assert "[0.5, 0.3, 0.3]" in words
    for same in ("optimizer.name", "data.std", "run.name"):
        assert same not in words
    assert "do not compare" not in words
    assert "abcone" in words
    assert {(CURVE, "s0"), (CURVE, "s1"), (BAR, "s0"), (BAR, "s1")} <= strokes(page)


def test_scores_of_other_images_are_a_warning(runs, compared):
    add_scores(runs[1], 0.8)
    (runs[1] / "eval" / "knn.json").unlink()
    add_scores(runs[1], 0.8, root="/other")
    _, _, page = compared(*runs)
    images = [
        f"9 training and 8 test images of {name}, test part: the data set's own"
        for name in ("digits", "/other")
    ]
    told = f"do not compare (nearest neighbours): one on {images[0]}; <two> on {images[1]}."
    assert told in " ".join(page.text)
    assert "Nearest neighbours: top1 <k=5>" not in page.text  # no bars of both in one card


def test_a_comparison_shows_what_several_runs_have_and_how_they_ended(runs, compared):
    add_scores(runs[0], 0.7, protocol="retrieval", root="/elsewhere", place="eval/on-elsewhere-1")
    (runs[1] / "summary.json").write_text(json.dumps({"warnings": ["the loss rises"], "steps": 1234}))
    for run, chosen in zip(runs, ("[a]", "[b]"), strict=True):
        config = load_saved(PretrainConfig, run / "config.yaml")
        jitter = replace(config.augment.view_1, jitter=0.5 if run is runs[0] else 0.25)
        augment = replace(config.augment, view_1=jitter, view_2=jitter)
        (run / "config.yaml").write_text(to_yaml(replace(config, augment=augment, chosen=[chosen])))
    page = compared(*runs)[2]
    assert "Nearest neighbours: top1 <k=5>" in page.text
    assert not any("Identities found again" in text for text in page.text)
    assert "<two>: the loss rises" in page.text
    assert f"1.5 of 200 epochs, not finished; {runs[0]}" in page.text
    assert f"200 epochs, 1,234 steps; {runs[1]}" in page.text
    assert "augment.view_1.jitter" in page.text
    assert not any(text.startswith(("augment.view_2", "chosen")) for text in page.text)


def test_another_librarys_network_has_scores_only(runs, tmp_path, compared, monkeypatch):
    """It keeps its own colour, also where a chart has no curve of it."""
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "runs" / "timm-resnet18-random"
    add_scores(foreign, 0.7)
    result, _, page = compared("timm:resnet18:random", *runs)
    assert result["runs"][0] == "timm-resnet18-random"
    assert (BAR, "s0") in strokes(page)
    assert (CURVE, "s0") not in strokes(page)
    assert {(CURVE, "s1"), (CURVE, "s2")} <= strokes(page)


def test_other_data_and_a_run_without_scores_are_told(runs, tmp_path, compared):
    _, _, page = compared(*runs)
    assert "Not " not in " ".join(page.text)
    _, _, page = compared(*runs, make_run(tmp_path / "bare", name="images", root=str(tmp_path)))
    words = " ".join(page.text)
    assert "curves do not compare: one on digits, <two> on digits, bare on images." in words
    assert "without scores: bare." in words


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, compared):
    made = [make_run(tmp_path / place / "run") for place in ("a", "b")]
    result, _, page = compared(*made)
    assert result["runs"] == [str(run) for run in made]
    assert "Their settings are the same." in " ".join(page.text)


def test_a_run_beside_itself_is_told_by_path_by_link_and_as_a_copy(runs, tmp_path, capsys):
    one, other = runs
    link, bare, bare_link = tmp_path / "link", tmp_path / "bare", tmp_path / "bare_link"
    link.symlink_to(one)
    copy = shutil.copytree(one, tmp_path / "copy")
    shutil.copytree(one, bare, ignore=shutil.ignore_patterns("encoder.safetensors"))
    bare_link.symlink_to(bare)
    for paths, told in (
        ([one, other, bare], None),
        ([one, one], f"2 times: {one}, {one}."),
        ([one, other, link, copy], "3 times: one, link, copy."),
        ([bare, bare_link], "2 times: bare, bare_link."),
    ):
        assert main(["report", *map(str, paths), f"out={tmp_path / 'out'}"]) == 0
        out, err = capsys.readouterr()
        line = f"The same run, or its exact repetition, {told}"
        page = Path(json.loads(out)["file"]).read_text()
        assert (line in page, f"report: {line}\n" in err) == (told is not None,) * 2
        assert page.count("exact repetition") == err.count("exact repetition") == (told is not None)


def test_health_where_it_was_measured(runs, compared):
    numbers = dict.fromkeys(("rankme", "dimensions", "alignment", "uniformity", "std"), 12.345)
    found = numbers | {"verdict": "healthy", "alignment": None, "dimensions": 64}
    stats = {
        "scores": dict.fromkeys(("encoder", "raw_pixels", "random_encoder"), found),
        "near_duplicates": {"pairs": 0, "listed": 0, "file": "near_duplicates.csv"},
    }
    own, other = (json.dumps(stats | {"data": data_of(runs[0], root)}) for root in (None, "/other"))
    (runs[0] / "eval" / "stats.json").write_text(own)
    assert "healthy" not in " ".join(compared(*runs)[2].text)  # of one of them alone nothing compares
    (runs[1] / "eval" / "stats.json").write_text(other)  # as versions before wrote it
    words = " ".join(compared(*runs)[2].text)
    assert "healthy " not in words
    told = "(health): one on 9 training images of digits; <two> on 9 training images of /other."
    assert f"Not of the same images, so they do not compare {told}" in words
    (runs[0] / "eval" / "on-other-1").mkdir()
    (runs[0] / "eval" / "on-other-1" / "stats.json").write_text(other)
    _, _, page = compared(*runs)
    words = " ".join(page.text)
    assert "do not compare" not in words
    assert "9 training images of /other" in page.text
    assert "healthy" in words
    assert "12.3" in words
    assert "not finite" in words
    assert "64" in page.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda result: [], "it holds no object"),
        (lambda result: {"protocol": "knn"}, "is missing"),
        (lambda result: result | {"scores": 5}, "not iterable"),
        (lambda result: result | {"scores": [{"name": 1}]}, "'encoder' is missing"),
        (lambda result: result | {"warnings": None}, "not iterable"),
        (lambda result: result | {"data": result["data"] | {"rows": {"train": 9}}}, "'test' is missing"),
        (
            lambda result: result | {"data": result["data"] | {"classes": ["0"]}},
            "confusion is not of 1 classes",
        ),
        (lambda result: result | {"details": []}, "no attribute"),
        (
            lambda result: result | {"scores": [result["scores"][0] | {"encoder": {"value": "high"}}]},
            "could not convert string to float: 'high'",
        ),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_results_of_another_shape_are_named(runs, capsys, change, reason, alone):
    path = runs[0] / "eval" / "knn.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    paths = map(str, runs[:1] if alone else runs)
    assert main(["report", *paths, "data.name=digits", "progress=false", "device=cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path}: not what contrastive-eval writes (" in err
    assert reason in err
    assert "delete it and evaluate again" in err


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"scores": Infinity}', '{"scores": 1e999}'])
def test_results_that_are_not_json_are_named(runs, capsys, text):
    path = runs[0] / "eval" / "knn.json"
    path.write_text(text)
    assert main(["report", *map(str, runs)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: is not JSON (" in err
    assert "; delete it, and evaluate again if it lies in eval/" in err


def test_a_run_without_an_encoder_has_a_page_of_its_own_and_a_run_twice_is_told(alone, tmp_path, capsys):
    """It stopped before its first checkpoint."""
    (alone / "encoder.safetensors").unlink()
    assert main(["report", str(alone), "device=cpu", "progress=false"]) == 0
    capsys.readouterr()
    assert (alone / "report.html").is_file()
    assert main(["report", str(alone), f"{alone}/eval/..", f"out={tmp_path}"]) == 0
    assert "a run is given twice, and compared with itself" in capsys.readouterr().err


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(runs[0]), str(tmp_path / "empty")]) == 2
    assert "holds neither config.yaml nor results" in capsys.readouterr().err
    assert main(["report", *[str(runs[0])] * 9]) == 2
    assert "9 runs given, up to 8" in capsys.readouterr().err

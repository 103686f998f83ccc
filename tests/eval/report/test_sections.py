import csv
import json
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from contrastive.config import DataConfig, ScheduleConfig
from contrastive.data.dataset import open_dataset
from eval.__main__ import main
from eval.report.pictures import confused
from eval.report.write import ReportEvaluation, write_report
from eval.run_files import describe_epochs
from tests.eval.conftest import add_pictures

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags must nest; collects what a browser would load, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags, self.text, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        self.texts.append((self.open[-1] if self.open else "", data))


def report(run):
    result = write_report(ReportEvaluation(checkpoint=str(run), device="cpu", progress=False))
    text = (run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    return result, text, page


@pytest.fixture(autouse=True)
def no_scikit_learn(request, monkeypatch):
    """Map by PCA, which is quick; one test takes t-SNE."""
    if "t_sne" not in request.node.name:
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)


@pytest.fixture
def scored_run(new_run, capsys):
    run = new_run()
    add_pictures(run)
    assert main(["knn", f"checkpoint={run}", "device=cpu", "progress=false"]) == 0
    capsys.readouterr()
    return run


def test_a_whole_page_that_needs_no_network(scored_run):
    result, text, page = report(scored_run)
    assert result["missing"] == []
    assert page.loads
    assert all(value.startswith("data:") for value in page.loads)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "prefers-color-scheme: dark" in text
    assert any(tag == "meta" and given.get("name") == "viewport" for tag, given in page.tags)
    words = " ".join(page.text)
    for heading in (
        "How good",
        "How did it learn",
        "What does the network see",
        "find hard",
        "Where does it err",
    ):
        assert heading in words
    score = json.loads((scored_run / "eval/knn.json").read_text())["scores"][0]["encoder"]["value"]
    assert f"{100 * score:.1f}" in words
    assert "95% intervals: Wilson, test images." in words
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 1 + 3  # views; an anchor and its two negatives
    assert sum(tag == "circle" for tag, _ in page.tags) >= 462  # the map
    assert "effective rank of the training features" in page.text
    assert "no collapse" in page.text  # which is no praise: kNN may still be at chance
    assert "healthy" not in page.text
    stats = {"scores": {name: {"rankme": 9.0} for name in ("encoder", "raw_pixels")}}
    duplicates = {"pairs": 3, "listed": 3, "file": "/elsewhere/near_duplicates.csv"}
    stats |= {"data": json.loads((scored_run / "eval/knn.json").read_text())["data"]}
    (scored_run / "eval/stats.json").write_text(json.dumps(stats | {"near_duplicates": duplicates}))
    words = report(scored_run)[2].text
    assert "effective rank of the training features" not in words  # but in the table
    assert "3 pairs of near-duplicates, in eval/near_duplicates.csv." in words


def test_the_effective_rank_of_the_head_is_the_one_of_stats(scored_run, capsys):
    facts = iter(report(scored_run)[2].text)
    head = next(value for name, value in pairwise(facts) if name == "effective rank of the training features")
    assert main(["stats", f"checkpoint={scored_run}", "device=cpu", "progress=false"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])["scores"]["encoder"]
    assert head == f"{found['rankme']:.1f} of {found['dimensions']}"
    assert "effective rank of the training features (RankMe)" in told.err
    assert "of the features of training images, 4,096 at most, evenly spread" in told.err


def test_same_label_negatives_are_framed(scored_run):
    labels = open_dataset(DataConfig(image_size=16)).train.labels
    same = int((labels == labels[0]).nonzero()[1])
    other = int((labels != labels[0]).nonzero()[0])
    header = ["anchor_row", "anchor_key", "rank", "negative_row", "negative_key", "similarity"]
    with (scored_run / "mined.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [header, [0, "a", 0, same, "same-one", 0.9], [0, "a", 1, other, "other", 0.5]]
        )
    _, _, page = report(scored_run)
    framed = [given["alt"] for tag, given in page.tags if tag == "img" and given.get("class") == "same"]
    assert framed == ["same-one"]


def test_names_from_files_are_text_not_markup(scored_run):
    _, text, page = report(scored_run)
    assert "<b>&a.png" not in text
    assert "<b>&a.png" in page.text


def test_unreadable_files_are_counted_and_the_first_are_shown(new_run):
    run = new_run(name="imagefolder", root="/nowhere/at/all")  # no map: quick
    assert "could not be read" not in " ".join(report(run)[2].text)
    lines = [f"{row},cats/<{row}>.jpg,OSError: truncated\n" for row in range(12)]
    (run / "corrupt.csv").write_text("row,key,reason\n" + "".join(lines))
    words = " ".join(report(run)[2].text)
    assert "Files that training left out: 12, 10 of them here" in words
    assert "on /nowhere/at/all (12 left out, see corrupt.csv) at 16 px" in words
    (run / "manifest.csv").write_text("row,key,size\n0,a.png,9\n1,b.png,9\n")
    assert "on 2 images of /nowhere/at/all (12 left out" in " ".join(report(run)[2].text)
    assert "cats/<9>.jpg" in words
    assert "cats/<10>.jpg" not in words
    assert "OSError: truncated" in words


def test_a_run_whose_data_is_gone(new_run):
    """The page says what it lacks; curves and the numbers are still there."""
    run = new_run(name="imagefolder", root="/nowhere/at/all")
    add_pictures(run)
    result, _, page = report(run)
    assert len(result["missing"]) == 2
    words = " ".join(page.text)
    assert "Not on this page" in words
    assert "/nowhere/at/all" in words
    assert "How did it learn" in words
    assert "c.png" in words


def test_warnings_that_held_at_the_end_of_training_are_shown(new_run):
    run = new_run(name="imagefolder", root="/nowhere/at/all")  # no map: quick
    (run / "summary.json").write_text(
        json.dumps({"steps": 3, "warnings": ["the loss <rises>", "a collapse"]})
    )
    _, text, page = report(run)
    head = text.partition("<section>")[0]
    assert "the loss &lt;rises&gt;" in head
    assert "a collapse" in page.text


@pytest.mark.parametrize("column", ["mining/similarity_mean", "train/negative_similarity"])
def test_negatives_are_drawn_beside_positives_mined_or_not(new_run, column):
    run = new_run(name="imagefolder", root="/nowhere/at/all")  # no map: quick
    (run / "metrics.csv").write_text(f"epoch,train/positive_similarity,{column}\n1,0.5,0.3\n2,0.7,0.2\n")
    page = report(run)[2]
    assert {"positive", "negatives"} <= {*page.text}
    assert "their top tenth" not in page.text
    lines = [given["stroke"] for tag, given in page.tags if tag == "path" and given["stroke-width"] == "1.8"]
    assert lines == ["var(--s0)", "var(--s1)"]


def test_a_bare_run(new_run):
    result, _, page = report(new_run())
    assert result["missing"] == []
    assert "How did it learn" not in " ".join(page.text)


@pytest.mark.parametrize(
    "text", [b"a,b\n1,2\n", b"\xff\xd8\xff\n\x00\n", b"anchor_row,anchor_key,negative_row\n0,a\n"]
)
def test_tables_of_something_else_cost_their_own_sections_only(new_run, text):
    run = new_run(name="imagefolder", root="/nowhere/at/all")  # no map: quick
    add_pictures(run)
    for name in ("metrics.csv", "mined.csv"):
        (run / name).write_bytes(text)
    result, _, page = report(run)
    words = " ".join(page.text)
    assert any("mined.csv: row 1 is not of hard negatives" in reason for reason in result["missing"])
    assert "What does the network see" in words
    assert "How did it learn" not in words
    assert "find hard" not in words


def test_the_most_frequent_mistakes_are_named():
    assert confused([[8, 2], [0, 5]], ["cat", "dog"]) == "cat as dog (2)"


def test_the_length_of_a_run_with_a_time_budget_is_what_its_summary_says(tmp_path):
    assert describe_epochs(tmp_path, ScheduleConfig(epochs=3, warmup_epochs=1.0)) == "3 epochs"
    assert describe_epochs(tmp_path, ScheduleConfig(epochs=1, warmup_epochs=0.0)) == "1 epoch"
    budget = ScheduleConfig(epochs=3, minutes=2.5)
    assert describe_epochs(tmp_path, budget) == "2.5 min"
    (tmp_path / "summary.json").write_text('{"epochs": 31.25}')
    assert describe_epochs(tmp_path, budget) == "31.2 epochs in 2.5 min"


def test_a_run_that_did_not_finish_says_how_far_it_came(tmp_path):
    whole, budget = ScheduleConfig(epochs=160), ScheduleConfig(epochs=3, minutes=2.5)
    (tmp_path / "metrics.csv").write_text("step,epoch,knn/top1\n0,0,0.1\n")
    assert describe_epochs(tmp_path, whole) == "160 epochs"  # how long an epoch is, is not known
    (tmp_path / "metrics.csv").write_text("step,epoch,knn/top1\n0,0,0.1\n330,33,\n340,34,\n")
    assert describe_epochs(tmp_path, whole) == "34.0 of 160 epochs, not finished"
    (tmp_path / "checkpoints" / "step-346").mkdir(parents=True)
    assert describe_epochs(tmp_path, whole) == "34.6 of 160 epochs, not finished"
    assert describe_epochs(tmp_path, budget) == "34.6 epochs of 2.5 min, not finished"
    (tmp_path / "summary.json").write_text('{"epochs": 160.0}')
    assert describe_epochs(tmp_path, whole) == "160 epochs"
    (tmp_path / "summary.json").write_text('{"epochs": 1.5, "finished": true}')  # by trainer.max_steps
    assert describe_epochs(tmp_path, whole) == "1.5 of 160 epochs"

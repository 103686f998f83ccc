import csv
import json
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from tests.eval.conftest import add_pictures

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags must nest; collects what a browser would load, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags, self.text = [], [], [], []

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


def report(run):
    from eval.config import EvalConfig
    from eval.report import write_report

    result = write_report(EvalConfig(checkpoint=str(run), device="cpu", progress=False))
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
    from eval.__main__ import main

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
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 1 + 3  # views; an anchor and its two negatives
    assert sum(tag == "circle" for tag, _ in page.tags) >= 462  # the map


def test_same_label_negatives_are_framed(scored_run):
    from contrastive.config import DataConfig
    from contrastive.data.sources import open_train

    labels = open_train(DataConfig(image_size=16)).labels
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
    assert any("mined.csv: row 1 is not of mined negatives" in reason for reason in result["missing"])
    assert "What does the network see" in words
    assert "How did it learn" not in words
    assert "find hard" not in words


def test_charts_place_points_where_they_belong():
    from eval.figures import line_chart

    svg = ElementTree.fromstring(
        line_chart([("a", [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]), ("b", [(2.0, 1.0)])])
    )
    path = next(item for item in svg if item.get("class") == "curve s0").get("d")
    points = [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[2][1] < points[0][1]  # SVG counts down
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    dot = next(item for item in svg if item.get("class") == "dot s1")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (points[2][0], points[0][1])


@pytest.mark.parametrize("span", [(0.0, 1.0), (4.1, 4.3), (-3.0, 1e3), (0.5, 0.5), (1e-7, 3e-7), (0.0, 0.0)])
def test_ticks_are_round_and_enclose(span):
    from eval.figures import ticks

    found = ticks(*span, 4)
    assert 2 <= len(found) <= 8
    assert found[0] <= span[0] + 1e-12
    assert found[-1] >= span[1] - 1e-12
    step = found[1] - found[0]
    assert f"{step:.2e}"[:4] in ("1.00", "2.00", "5.00")


def test_heat_map_counts_and_mistakes():
    from eval.figures import heat_map
    from eval.report import _confused

    counts = [[8, 2], [0, 5]]
    svg = ElementTree.fromstring(heat_map(counts, ["<cat>", "dog"]))
    kinds = [item.get("class") for item in svg if item.tag == "rect"]
    assert kinds == ["right", "wrong", "right"]
    assert _confused(counts, ["cat", "dog"]) == "cat as dog (2)"


def test_t_sne_keeps_clusters_together():
    from eval.report import _project

    labels = torch.arange(60) % 3
    rows = torch.eye(3, 8)[labels] * 20 + torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    points, method = _project(rows)
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(1)
    assert method == "t-SNE"
    assert (labels[nearest] == labels).all()


def test_projection_without_scikit_learn():
    """PCA: the first axis carries the most variance, and distances along it are kept."""
    from eval.report import _project

    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9, 3, 1, 1, 1, 1.0])
    points, method = _project(rows)
    assert method == "PCA"
    wanted = torch.linalg.svdvals(rows - rows.mean(0))[:2]
    torch.testing.assert_close(points.norm(dim=0), wanted, rtol=1e-4, atol=1e-4)

"""The reports in a real browser: nothing logged, nothing missing, nothing fetched, nothing too wide."""

import json
import sys

import pytest

from eval.__main__ import main
from tests.browser import browser, installed
from tests.eval.conftest import add_pictures, make_run
from tests.eval.report.test_comparison import CLIPS, add_scores

pytestmark = pytest.mark.skipif(
    installed() is None, reason="no Chromium here; .ci/run installs Debian's where it may"
)

STATE = """({
    images: [...document.images].map(image => [image.alt, image.complete && image.naturalWidth > 0]),
    width: [document.documentElement.scrollWidth, window.innerWidth],
    cut: [...document.querySelectorAll('.scroll, .strip')].filter(b => b.scrollWidth > b.clientWidth).length,
    views: document.querySelector('.views img')?.offsetWidth,
    strip: [...document.querySelectorAll('.strip figure:not(:first-child)')].map(cell => cell.offsetWidth),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    bars: Boolean(document.querySelector('td.picture')?.offsetParent),
    legend: Boolean(document.querySelector('p.picture')?.offsetParent),
    resources: performance.getEntriesByType('resource').map(entry => entry.name),
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of one run and a comparison of three, one of them another library's network."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [make_run(folder / "first"), make_run(folder / "a-second-run-with-a-rather-long-name")]
    for run in runs:
        add_pictures(run)
        assert main(["knn", f"checkpoint={run}", "device=cpu", "progress=false", "knn.k=[5]"]) == 0
    assert main(["stats", f"checkpoint={runs[0]}", "device=cpu", "progress=false", "stats.rows=64"]) == 0
    add_scores(runs[0], 0.9, protocol="worth")
    foreign = folder / "torchvision-resnet18-random" / "eval"
    foreign.mkdir(parents=True)
    foreign.joinpath("knn.json").write_bytes((runs[0] / "eval" / "knn.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.manifold", None)  # the map by PCA, which is quick
        assert main(["report", str(runs[0]), "device=cpu", "progress=false"]) == 0
    assert main(["report", *map(str, runs), str(foreign.parent)]) == 0
    return {"report": runs[0] / "report.html", "comparison": next(folder.glob("comparison-*.html"))}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def luminance(colour):
    """Of ``rgb(r, g, b)``; WCAG 2's relative luminance."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, False)])
def test_a_page_as_a_reader_sees_it(name, width, dark, pages, chromium):
    chromium.resize(width, 800, dark=dark)
    chromium.open(pages[name])
    seen = chromium.run(STATE)
    assert all(loaded for _, loaded in seen["images"]), seen["images"]
    assert bool(seen["images"]) == (name == "report")
    page, window = seen["width"]
    assert page <= window == width
    assert seen["strip"] == ([84, 84] if name == "report" else [])  # whatever the length of a path
    if name == "report":
        assert seen["cut"] == 0  # the worth table, health, negatives: nothing is beside the screen
        assert seen["views"] >= 700  # its images can be seen; a narrow screen scrolls
    assert seen["bars"] == (name == "comparison" or width > 560)
    assert seen["legend"] == (name == "report" and width > 560)  # of the bars
    assert [url for url in seen["resources"] if not url.startswith("data:")] == []
    asked = [
        event["params"]["request"]["url"]
        for event in chromium.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in chromium.events if event["method"] in told] == []
    paper, ink = luminance(seen["paper"]), luminance(seen["ink"])
    assert (paper < ink) == dark
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7


@pytest.mark.parametrize("width", [390, 1280])
def test_the_numbers_of_five_networks_and_their_bars_are_on_the_page(width, tmp_path, chromium):
    run = make_run(tmp_path / "films", name="imagefolder", root="/nowhere/at/all")
    for protocol, name in (("worth", "10 labels a class"), ("knn", "top1 k=200")):
        add_scores(run, 0.5, protocol=protocol, name=name, others=CLIPS)
    assert main(["report", str(run), "device=cpu", "progress=false"]) == 0
    chromium.resize(width, 800, dark=False)
    chromium.open(run / "report.html")
    seen = chromium.run(STATE)
    assert (seen["cut"], seen["bars"], seen["legend"]) == (0, width > 560, width > 560)


def test_a_page_that_asks_for_more_is_held_back(tmp_path, chromium):
    """The test would notice: a picture from elsewhere, a script, a broken path are all told."""
    from eval.pages.page import page

    (tmp_path / "bad.html").write_text(
        page(
            "bad", ['<img alt="far" src="http://192.0.2.1/x.png"><script>1</script><svg><path d="M"/></svg>']
        )
    )
    chromium.open(tmp_path / "bad.html")
    told = json.dumps([event for event in chromium.events if event["method"] == "Log.entryAdded"])
    assert "192.0.2.1" in told
    assert "script" in told
    assert "attribute d" in told
    assert chromium.run(STATE)["images"] == [["far", False]]

import itertools
from xml.etree import ElementTree

import pytest
import torch
from PIL import ImageColor

from contrastive.drawing.canvas import rgb


@pytest.fixture
def figures():
    from contrastive.drawing import figures

    return figures


def parse(drawing):
    return ElementTree.fromstring(drawing.svg())


def corner(element):
    return float(element.get("x")), float(element.get("y"))


def test_charts_place_points_where_they_belong(figures):
    svg = parse(figures.line_chart([("a", [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]), ("b", [(2.0, 1.0)])]))
    path = next(item for item in svg if item.get("stroke") == "var(--s0)").get("d")
    points = [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[2][1] < points[0][1]  # SVG counts down
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    dot = next(item for item in svg if item.tag == "circle")
    assert dot.get("fill") == "var(--s1)"
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (points[2][0], points[0][1])


def test_charts_name_their_axis_below_the_ticks(figures):
    svg = parse(figures.line_chart([("a", [(0.0, 1.0), (40.0, 3.0)])], "step"))
    texts = {item.text: corner(item) for item in svg if item.tag == "text"}
    assert texts["step"][1] > texts["40"][1] > texts["1"][1]


@pytest.mark.parametrize("span", [(0.0, 1.0), (4.1, 4.3), (-3.0, 1e3), (0.5, 0.5), (1e-7, 3e-7), (0.0, 0.0)])
def test_ticks_are_round_and_enclose(figures, span):
    found = figures.ticks(*span, 4)
    assert 2 <= len(found) <= 8
    assert found[0] <= span[0] + 1e-12
    assert found[-1] >= span[1] - 1e-12
    step = found[1] - found[0]
    assert f"{step:.2e}"[:4] in ("1.00", "2.00", "5.00")


def test_a_map_has_a_dot_for_each_class_and_a_legend(figures):
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    drawing = figures.scatter(points, torch.tensor([0, 1, -1]), ["cat", "dog"], "map", legend=True)
    drawn = drawing.pixels(scale=2)
    side, margin = 2 * figures._SIDE, 2 * figures._MARGIN
    corners = [(margin, margin), (side - margin, side - margin), (side - margin, margin)]
    for (y, x), label in zip(corners, (0, 1, -1), strict=True):
        assert tuple(drawn[:, y, x].tolist()) == ImageColor.getrgb(figures.class_colour(label, 2))
    assert drawn.shape[2] > side
    assert figures.scatter(points, None, (), "map").pixels(2).shape == (3, side, side)
    assert len({figures.class_colour(label, 10) for label in range(-1, 10)}) == 11
    assert [item.text for item in parse(drawing) if item.tag == "text"] == ["cat", "dog"]


def test_a_map_of_many_classes_has_no_legend(figures):
    points, labels = torch.rand(30, 2), torch.arange(30)
    classes = [f"{row}" for row in range(30)]
    assert figures.scatter(points, labels, classes, "map", legend=True).width == figures._SIDE


def test_confusion_is_blue_where_right_and_red_where_wrong(figures):
    names = [f"{row}" for row in range(100)]  # too many to be written
    counts = [[0] * 100 for _ in names]
    counts[0][0], counts[1][0], counts[1][1] = 10, 9, 1
    drawn = figures.confusion(counts, names).pixels(scale=2).float()
    side = drawn.shape[1] / 100
    cells = [[drawn[:, int((r + 0.4) * side), int((c + 0.4) * side)] for c in (0, 1)] for r in (0, 1)]
    right, wrong = (torch.tensor(rgb(name)).float() for name in ("s0", "same"))
    torch.testing.assert_close(cells[0][0], right)
    torch.testing.assert_close(cells[0][1], torch.full((3,), 255.0))
    torch.testing.assert_close(cells[1][0], (255 - 0.9**0.5 * (255 - wrong)).round())
    assert cells[1][1].min() > 220
    assert figures.confusion([[0] * 3] * 3, ["a"] * 3).pixels().min() >= 40  # text alone, which is grey


def test_confusion_names_classes_and_counts(figures):
    svg = parse(figures.confusion([[8, 2], [0, 5]], ["<cat>", "a dog with a long name"]))
    boxes = [item.get("fill") for item in svg if item.tag == "rect"]
    assert boxes == ["var(--s0)", "var(--same)", "var(--s0)"]
    texts = [item.text for item in svg if item.tag == "text"]
    assert texts == ["<cat>", "<cat>", "8", "2", "a dog with…", "a dog with…", "5"]
    titles = [item.findtext("title") for item in svg if item.tag == "rect"]
    assert titles[1] == "<cat> taken for a dog with a long name: 2 of 10"


@pytest.mark.parametrize("classes", [24, 40])
def test_names_of_classes_do_not_overlap(figures, classes):
    names = [f"class {row}" for row in range(classes)]
    svg = parse(figures.confusion([[1] * classes] * classes, names))
    tops = [corner(item)[1] for item in svg if item.get("text-anchor") == "end"]
    assert len(tops) == classes
    assert min(below - above for above, below in itertools.pairwise(tops)) >= 11

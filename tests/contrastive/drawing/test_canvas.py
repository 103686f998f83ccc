"""Test that SVG and pixels are drawn at the same places; test_browser.py asks a browser."""

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def canvas():
    from contrastive.drawing import canvas

    return canvas


def dark(drawing):
    """Rows and columns of what is not white: (top, bottom, left, right)."""
    drawn = drawing.pixels(scale=4).float().mean(0) < 250
    rows, columns = drawn.any(1).nonzero(), drawn.any(0).nonzero()
    return [int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])]


def test_shapes_are_drawn_where_they_are(canvas):
    shapes = {
        canvas.Dot(30, 20, 5, "ink"): [60, 100, 100, 140],
        canvas.Box(10, 20, 30, 5, "ink"): [80, 99, 40, 159],
        canvas.Line(((10, 20), (40, 20)), "ink", 2): [76, 83, 40, 160],
    }
    for shape, places in shapes.items():
        found = dark(canvas.Drawing(60, 50, "one shape", [shape]))
        assert found == pytest.approx(places, abs=2), shape


def test_text_stands_on_its_baseline_and_turns_about_its_start(canvas):
    top, bottom, left, right = dark(canvas.Drawing(90, 90, "", [canvas.Label(20, 60, "HHHH", "start")]))
    assert bottom == pytest.approx(4 * 60, abs=4)
    assert left == pytest.approx(4 * 20, abs=8)
    upright = dark(canvas.Drawing(90, 90, "", [canvas.Label(20, 60, "HHHH", "start", upright=True)]))
    assert upright[3] == pytest.approx(4 * 20, abs=4)  # what was down is right
    assert upright[1] == pytest.approx(4 * 60, abs=8)  # it begins below and reads upwards
    assert upright[1] - upright[0] == pytest.approx(right - left, abs=1)
    assert upright[3] - upright[2] == pytest.approx(bottom - top, abs=1)


def test_an_opaque_box_covers_and_a_faint_one_is_near_white(canvas):
    boxes = [canvas.Box(0, 0, 9, 9, "same", opacity) for opacity in (1.0, 0.25)]
    full, faint = (canvas.Drawing(9, 9, "", [box]).pixels(1)[:, 4, 4].float() for box in boxes)
    torch.testing.assert_close(255 - faint, (255 - full) / 4, rtol=0, atol=0.51)


def test_a_picture_is_enlarged_by_whole_pixels_where_it_is(canvas):
    pixels = torch.tensor([[[10, 200]], [[20, 100]], [[30, 50]]], dtype=torch.uint8)
    drawing = canvas.Drawing(60, 50, "", [canvas.Picture(10, 20, 8, 4, pixels, "a <b>")])
    assert dark(drawing) == [80, 95, 40, 71]
    drawn = drawing.pixels(scale=4)[:, 80:96, 40:72]
    assert torch.equal(drawn, pixels.repeat_interleave(16, 1).repeat_interleave(16, 2))
    svg = ElementTree.fromstring(drawing.svg())
    assert [svg[0].get(name) for name in ("x", "y", "width", "height")] == ["10.0", "20.0", "8.0", "4.0"]
    assert svg[0].findtext("title") == "a <b>"
    content = base64.b64decode(svg[0].get("href").removeprefix("data:image/png;base64,"))
    shown = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
    assert torch.equal(shown, pixels)


def test_svg_takes_colours_from_the_page_and_text_as_text(canvas):
    shapes = [canvas.Label(1, 2, "<b>"), canvas.Dot(1, 2, 3, "#123456", "a & b")]
    svg = ElementTree.fromstring(canvas.Drawing(10, 20, 'a "title"', shapes).svg())
    assert svg.get("viewBox") == "0 0 10 20"
    assert svg.get("aria-label") == 'a "title"'
    assert (svg[0].text, svg[0].get("fill")) == ("<b>", "var(--muted)")
    assert (svg[1].findtext("title"), svg[1].get("fill")) == ("a & b", "#123456")


def test_every_series_has_a_colour(canvas):
    assert {f"s{n}" for n in range(canvas.SERIES)} < canvas.COLOURS.keys()

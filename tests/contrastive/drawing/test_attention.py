"""Test that maps, heads and components are drawn where and as they should be."""

import pytest
import torch


@pytest.fixture
def drawing():
    from contrastive.drawing import attention

    return attention


RED, GREY, BLUE = (170, 8, 24), (216, 216, 216), (16, 48, 140)


def test_colours_go_from_blue_over_grey_to_red(drawing):
    colours = drawing.heat(torch.linspace(0, 1, 101)[None])[:, 0].T.tolist()
    assert [tuple(colours[place]) for place in (0, 50, 100)] == [BLUE, GREY, RED]
    assert colours[25] == [96, 146, 214]


def test_a_scale_has_ends_and_a_middle(drawing):
    scale = drawing.Scale(0, 4, "x")
    assert scale.place(torch.tensor([-1.0, 0.0, 1.0, 4.0, 9.0])).tolist() == [0, 0, 0.25, 1, 1]
    assert scale.middle == 2
    scale = drawing.Scale(0.25, 4, "x", logarithmic=True)
    assert scale.place(torch.tensor([0.0, 0.25, 0.5, 1.0, 4.0, 9.0])).tolist() == pytest.approx(
        [0, 0, 0.25, 0.5, 1, 1]
    )
    assert scale.middle == 1


def test_a_map_lies_over_the_image_position_by_position(drawing):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, 4:] = 200
    drawn = drawing.overlay(image, torch.tensor([[0.5, 0.5], [1.0, 0.5]]), 16).float()
    assert drawn.shape == (3, 16, 16)
    red = 0.6 * torch.tensor(RED)
    torch.testing.assert_close(drawn[:, 8:, :8], red[:, None, None].expand(3, 8, 8), rtol=0, atol=0.51)
    assert (drawn[:, :8, :8] == 130).all()  # 0.6 of 216
    assert (drawn[:, :, 8:] == 210).all()  # and 0.4 of 200


def test_equal_tokens_have_equal_colours_over_all_images(drawing):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 6, generator=generator)
    places = torch.randint(4, (3, 5, 5), generator=generator)
    colours = drawing.component_colours(kinds[places])
    assert colours.shape == (3, 3, 5, 5)
    seen = colours.permute(0, 2, 3, 1)
    shown = {kind: {tuple(colour) for colour in seen[places == kind].tolist()} for kind in range(4)}
    assert all(len(of_kind) == 1 for of_kind in shown.values())
    assert len(set.union(*shown.values())) == 4
    assert (colours.amin((0, 2, 3)), colours.amax((0, 2, 3))) == (
        pytest.approx(torch.zeros(3)),
        pytest.approx(torch.full((3,), 255)),
    )


def test_a_sheet_has_a_row_for_each_network_and_a_tile_for_each_map(drawing):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def panels(value):
        maps = {"rollout": torch.full((2, 2), value), "last layer": torch.zeros(2, 2)}
        return drawing.Panels(maps, [torch.zeros(2, 2)] * 3, torch.zeros(3, 2, 2, dtype=torch.uint8))

    scale = drawing.Scale(0.25, 4, "times", logarithmic=True)
    made = drawing.sheet(image, {"encoder": panels(4.0), "random": panels(0.0)}, scale)
    pictures = [shape for shape in made.shapes if isinstance(shape, drawing.Picture)]
    assert len(pictures) == 1 + 2 * (2 + 3 + 1) + 1  # image, maps, heads, components, scale
    by_title = {picture.title: picture for picture in pictures}
    for name, colour in (("encoder", RED), ("random", BLUE)):
        corner = by_title[f"{name}: rollout"].pixels[:, 0, 0].tolist()
        assert corner == pytest.approx([0.6 * part for part in colour], abs=0.51)
    boxes = [(p.x, p.y, p.x + p.width, p.y + p.height) for p in pictures]
    for first in range(len(boxes)):
        for second in range(first):
            a, b = boxes[first], boxes[second]
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (pictures[first].title, pictures[second].title)
    assert max(box[2] for box in boxes) <= made.width
    assert max(box[3] for box in boxes) <= made.height < max(box[3] for box in boxes) + 10
    below = [shape for shape in made.shapes if isinstance(shape, drawing.Label) and shape.anchor == "start"]
    assert {shape.text for shape in below if shape.x == by_title["image"].x} == {
        "image",
        "0.25",
        "times",
        "components: 1st red,",
        "2nd green, 3rd blue",
    }
    texts = {shape.text for shape in made.shapes if isinstance(shape, drawing.Label)}
    assert {
        "image",
        "rollout",
        "last layer",
        "components",
        "encoder",
        "random",
        "times",
        "0.25",
        "1",
        "4",
    } <= texts


def test_a_network_without_heads_has_no_column_for_them(drawing):
    image, colours = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 2, 2, dtype=torch.uint8)
    made = drawing.sheet(
        image,
        {"encoder": drawing.Panels({"similarity": torch.ones(2, 2)}, [], colours)},
        drawing.Scale(0, 1, ""),
    )
    assert max(shape.y for shape in made.shapes) < made.height
    assert not any("heads" in getattr(shape, "text", "") for shape in made.shapes)

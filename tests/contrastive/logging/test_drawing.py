import numpy as np
import pytest
import torch


@pytest.fixture
def drawing():
    from contrastive.logging import drawing

    return drawing


def test_a_strip_shows_each_image_and_frames_what_has_the_same_label(drawing):
    images = [torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (10, 90, 200)]
    drawn = drawing.strip(images, [False, True, False], side=32)
    tile = drawn.shape[1]
    assert drawn.shape == (3, tile, 3 * tile)
    red = torch.tensor(drawing._SAME, dtype=torch.uint8)
    for place, value in enumerate((10, 90, 200)):
        part = drawn[:, :, place * tile : (place + 1) * tile]
        assert (part == value).all(0).sum() == 32 * 32
        framed = (part == red[:, None, None]).all(0)
        assert framed.sum() == ((32 + 6) ** 2 - 32**2 if place == 1 else 0)


def test_scaling_repeats_pixels_or_averages_them(drawing):
    small = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 2, 2)
    assert torch.equal(drawing.scaled(small, 4)[:, ::2, ::2], small)
    checkered = (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).mul(255).to(torch.uint8)
    shrunk = drawing.scaled(checkered.expand(3, 64, 64), 16)
    assert (shrunk.float() - 127.5).abs().max() < 3  # not a pattern of 0 and 255


def test_the_plane_is_that_of_a_singular_value_decomposition(drawing):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5, 0.2]) + 7
    plane = drawing.principal_plane(rows)
    centred = rows.numpy() - rows.numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in (0, 1):
        expected = u[:, axis] * s[axis]
        assert abs(np.abs(plane[:, axis].numpy() - expected).max()) < 1e-3 or (
            np.abs(plane[:, axis].numpy() + expected).max() < 1e-3
        )
    # Columns 1 and 3 vary most, so they are the largest loadings, which are positive.
    for axis, column in ((0, 1), (1, 3)):
        assert np.corrcoef(plane[:, axis], rows[:, column])[0, 1] > 0.9
    torch.testing.assert_close(drawing.principal_plane(-rows), -plane)
    assert drawing.principal_plane(rows[:, :1]).shape == (50, 2)


def test_a_map_has_a_dot_for_each_class_and_a_legend(drawing):
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    drawn = drawing.draw_map(points, torch.tensor([0, 1, -1]), ["cat", "dog"])
    side, margin = drawing._MAP, drawing._MARGIN
    corners = [(margin, margin), (side - margin, side - margin), (side - margin, margin)]
    for (y, x), label in zip(corners, (0, 1, -1), strict=True):
        assert tuple(drawn[:, y, x].tolist()) == drawing.colour(label, 2)
    assert drawn.shape[2] > side
    assert drawing.draw_map(points, None, ()).shape == (3, side, side)
    assert len({drawing.colour(label, 10) for label in range(-1, 10)}) == 11


def test_confusion_is_blue_where_right_and_red_where_wrong(drawing):
    counts = torch.tensor([[10, 0], [9, 1]])
    drawn = drawing.draw_confusion(counts, [f"{row}" for row in range(100)]).float()
    side = drawn.shape[1] // 2
    cells = [[drawn[:, r * side + side // 2, c * side + side // 2] for c in (0, 1)] for r in (0, 1)]
    torch.testing.assert_close(cells[0][0], torch.tensor(drawing._RIGHT).float())
    torch.testing.assert_close(cells[0][1], torch.full((3,), 255.0))
    expected = 255 - 0.9**0.5 * (255 - torch.tensor(drawing._SAME).float())
    torch.testing.assert_close(cells[1][0], expected.round())
    assert cells[1][1].min() > 220
    named = drawing.draw_confusion(counts, ["cat", "dog"])
    assert named.shape[2] > drawn.shape[2]
    assert drawing.draw_confusion(torch.zeros(3, 3, dtype=torch.int64), ["a"] * 3).min() >= 40

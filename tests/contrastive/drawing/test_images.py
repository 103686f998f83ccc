import pytest
import torch


@pytest.fixture
def drawing():
    from contrastive.drawing import images

    return images


def test_a_strip_shows_each_image_and_frames_what_has_the_same_label(drawing):
    images = [torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (10, 90, 200)]
    drawn = drawing.strip(images, [False, True, False], side=32)
    tile = drawn.shape[1]
    assert drawn.shape == (3, tile, 3 * tile)
    red = torch.tensor(drawing.rgb("same"), dtype=torch.uint8)
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


def test_the_picture_of_a_clip_is_four_frames_of_it_line_by_line(drawing):
    clip = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 6, 6)
    picture = drawing.still(clip)
    assert picture.shape == (3, 12, 12)
    assert picture[0, ::6, ::6].tolist() == [[0, 3], [6, 9]]
    assert torch.equal(drawing.still(clip[4]), clip[4])
    assert drawing.film_strip(clip)[0, 0, ::6].tolist() == [*range(10)]


def test_the_picture_of_a_short_clip_repeats_frames(drawing):
    clip = torch.tensor([7, 9], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    assert drawing.still(clip)[0, ::4, ::4].tolist() == [[7, 7], [7, 9]]

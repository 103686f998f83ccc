import math

import torch

from contrastive.augment.corrupt import Erase, GaussianNoise, Occlude
from contrastive.augment.noise import normals, uniforms


def draw(op, count):
    return op.draw(uniforms(0, 0, torch.arange(count), 0, op.num_uniforms))


def test_noise_adds_its_own_normals_to_each_image():
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    op = GaussianNoise(0.1)
    params = draw(op, 5)
    difference = op(images, params=params) - images
    expected = 0.1 * normals(params["stream"], 108).view(5, 3, 6, 6)
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)
    assert abs(op(torch.zeros(2000, 3, 6, 6), params=draw(op, 2000)).std() - 0.1) < 5 * 0.1 / math.sqrt(
        2 * 216_000
    )


def test_erased_pixels_are_those_whose_centre_is_in_the_rectangle():
    images = torch.rand(50, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    op = Erase((0.02, 0.3), (0.1, 0.2, 0.3))
    params = draw(op, 50)
    views = op(images, params=params)
    for image, view, (left, top, width, height) in zip(
        images, views, params["rectangle"].tolist(), strict=True
    ):
        for row in range(16):
            for column in range(12):
                x, y = (column + 0.5) / 12, (row + 0.5) / 16
                hidden = left <= x < left + width and top <= y < top + height
                expected = torch.tensor([0.1, 0.2, 0.3]) if hidden else image[:, row, column]
                assert torch.equal(view[:, row, column], expected)


def test_rectangles_have_torchvisions_areas_and_ratios():
    op = Erase((0.02, 0.2), (0.0, 0.0, 0.0), p=0.25)
    params = draw(op, 10_000)
    left, top, width, height = params["rectangle"].unbind(1)
    assert abs(params["batch_prob"].float().mean() - 0.25) < 0.022
    area, ratio = width * height, (width / height).log()
    for drawn, low, high in ((area, 0.02, 0.2), (ratio, math.log(0.3), math.log(3.3))):
        assert drawn.min() >= low - 1e-5
        assert drawn.max() <= high + 1e-5
        assert abs(drawn.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 10_000)
        assert abs(drawn.std() / ((high - low) / math.sqrt(12)) - 1) < 0.03
    assert left.min() >= 0
    assert (left + width).max() <= 1 + 1e-6
    assert top.min() >= 0
    assert (top + height).max() <= 1 + 1e-6


def test_occluded_pixels_have_the_colour_of_the_image_or_are_those_of_another():
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for pastes in (False, True):
        op = Occlude((0.1, 0.4), pastes=pastes)
        params = draw(op, 12)
        views = op(images, params=params)
        seen = set()
        for index, (left, top, width, height) in enumerate(params["rectangle"].tolist()):
            other = (index + 1 + int(params["other"][index] * 11)) % 12
            seen.add(other - index)
            for row in range(16):
                for column in range(16):
                    x, y = (column + 0.5) / 16, (row + 0.5) / 16
                    hidden = left <= x < left + width and top <= y < top + height
                    paint = images[other, :, row, column] if pastes else params["colour"][index]
                    expected = paint if hidden else images[index, :, row, column]
                    assert torch.equal(views[index, :, row, column], expected)
        assert 0 not in seen
        assert len(seen) > 4

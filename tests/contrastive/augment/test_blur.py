import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from contrastive.augment.blur import GaussianBlur, blur
from contrastive.augment.noise import uniforms
from tests.reference import augment as reference

SIGMAS = torch.tensor([0.1, 0.5, 1.0, 2.0])


@pytest.fixture
def images():
    return torch.rand(4, 3, 20, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("radius", [2, 8])
def test_blur_equals_the_reference_and_torchvision(images, radius):
    ours = blur(images, SIGMAS, radius)
    for image, sigma, view in zip(images, SIGMAS.tolist(), ours, strict=True):
        np.testing.assert_allclose(view, reference.blur(image.numpy(), sigma, radius), atol=2e-6)
        expected = tv.gaussian_blur(image, [2 * radius + 1, 2 * radius + 1], [sigma, sigma])
        torch.testing.assert_close(view, expected, atol=2e-6, rtol=0)


def test_the_cut_at_four_deviations_is_below_8_bits(images):
    op = GaussianBlur((0.1, 2.0))
    large = torch.nn.functional.interpolate(images, scale_factor=3)
    ours = op(large, params={"sigma": SIGMAS})
    for image, sigma, view in zip(large, SIGMAS.tolist(), ours, strict=True):
        wide = tv.gaussian_blur(image, [23, 23], [sigma, sigma])
        assert (view - wide).abs().max() < 1 / 512


def test_images_smaller_than_the_kernel_are_blurred_too():
    tiny = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = blur(tiny, torch.tensor([2.0]), 8)
    np.testing.assert_allclose(ours[0], reference.blur(tiny[0].numpy(), 2.0, 3), atol=2e-6)


def test_sigma_is_uniform_and_the_weight_is_kept(images):
    op = GaussianBlur((0.1, 2.0), p=0.5)
    params = op.draw(uniforms(0, 0, torch.arange(10_000), 0, op.num_uniforms))
    assert abs(params["batch_prob"].float().mean() - 0.5) < 0.025
    assert params["sigma"].min() >= 0.1
    assert params["sigma"].max() <= 2.0
    assert abs(params["sigma"].mean() - 1.05) < 5 * 1.9 / math.sqrt(12 * 10_000)
    flat = torch.full((4, 3, 20, 14), 0.7)
    torch.testing.assert_close(blur(flat, SIGMAS, 8), flat, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(56, 57), (130, 30)])
def test_blocks_of_a_long_axis_make_up_the_whole(monkeypatch, height, width):
    from contrastive.augment import blur

    images, sigma = torch.rand(2, 3, height, width), torch.tensor([0.1, 2.0])
    blocks = blur.blur(images, sigma, 8)
    monkeypatch.setattr(blur, "_BLOCK", 1000)
    torch.testing.assert_close(blocks, blur.blur(images, sigma, 8), rtol=1e-5, atol=1e-6)

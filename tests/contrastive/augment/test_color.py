import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import ColorJitter as TorchvisionJitter
from torchvision.transforms.v2 import functional as tv

from contrastive.augment.color import ColorJitter, Grayscale, Solarize, luminance, shift_hue
from contrastive.augment.noise import uniforms
from tests.reference import augment as reference


@pytest.fixture
def images():
    """Random pixels, and the cases that formulas forget: black, white, grey, ties, one channel."""
    pixels = torch.rand(6, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    special = [
        (0, 0, 0),
        (1, 1, 1),
        (0.5, 0.5, 0.5),
        (1, 1, 0),
        (0, 1, 1),
        (1, 0, 1),
        (0.2, 0.7, 0.7),
        (0, 0, 1),
    ]
    special += [(1, 0, 0), (1e-30, 0, 0), (1e-42, 1e-44, 0), (1, 1 - 2**-24, 1)]
    pixels[:, :, 0, :] = torch.tensor(special[:11]).T
    pixels[:, :, 1, 0] = torch.tensor(special[11])
    return pixels


STRENGTHS = {
    "brightness": torch.tensor([1.0, 0.6, 1.4, 0.9, 1.7, 0.2]),
    "contrast": torch.tensor([1.0, 1.4, 0.6, 1.8, 0.3, 1.0]),
    "saturation": torch.tensor([1.0, 0.7, 1.8, 0.0, 1.2, 1.5]),
    "hue": torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.27]),
}


def test_jitter_equals_the_reference(images):
    ours = ColorJitter(0.8, 0.8, 1.0, 0.5)(images, params=dict(STRENGTHS))
    for i, view in enumerate(ours):
        strengths = (float(STRENGTHS[name][i]) for name in ("brightness", "contrast", "saturation", "hue"))
        np.testing.assert_allclose(view, reference.jitter(images[i].numpy(), *strengths), atol=2e-5)


def test_jitter_equals_torchvision(images):
    ours = ColorJitter(0.8, 0.8, 1.0, 0.5)(images, params=dict(STRENGTHS))
    for i, view in enumerate(ours):
        expected = tv.adjust_brightness(images[i], float(STRENGTHS["brightness"][i]))
        expected = tv.adjust_contrast(expected, float(STRENGTHS["contrast"][i]))
        expected = tv.adjust_saturation(expected, float(STRENGTHS["saturation"][i]))
        expected = tv.adjust_hue(expected, float(STRENGTHS["hue"][i]))
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [0.0, 0.03, -0.1, 1 / 3, 0.5, -0.5])
def test_hue_alone_equals_torchvision(images, turns):
    ours = shift_hue(images, torch.full((len(images),), turns))
    torch.testing.assert_close(ours, tv.adjust_hue(images, turns), atol=5e-6, rtol=0)


def test_hue_by_thirds_permutes_channels_and_a_zero_turn_is_the_identity(images):
    count = len(images)
    torch.testing.assert_close(
        shift_hue(images, torch.full((count,), 1 / 3)), images[:, [2, 0, 1]], atol=2e-6, rtol=0
    )
    torch.testing.assert_close(shift_hue(images, torch.zeros(count)), images, atol=1e-6, rtol=0)


def test_factors_are_distributed_as_torchvisions():
    op = ColorJitter(0.4, 1.5, 0.2, 0.1, p=0.8)
    drawn = op.draw(uniforms(0, 0, torch.arange(10_000), 0, op.num_uniforms))
    assert abs(drawn["batch_prob"].float().mean() - 0.8) < 0.02
    torch.manual_seed(0)
    theirs = TorchvisionJitter(0.4, 1.5, 0.2, 0.1)
    pairs = [
        theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
        for _ in range(2_000)
    ]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        expected = torch.tensor([pair[column] for pair in pairs])
        assert (
            abs(drawn[name].mean() - expected.mean()) < 5 * expected.std() * (1 / 10_000 + 1 / 2_000) ** 0.5
        )
        torch.testing.assert_close(drawn[name].std(), expected.std(), rtol=0.05, atol=0)
        torch.testing.assert_close(drawn[name].aminmax(), expected.aminmax(), rtol=0.01, atol=0.01)


def test_means_and_spreads_of_jitter_are_those_of_torchvisions_random_order():
    """4,000 draws on colours spread over the cube; the order is fixed here and random there."""
    colours = torch.rand(20, 3, 1, 2, generator=torch.Generator().manual_seed(1))
    op = ColorJitter(0.4, 0.4, 0.4, 0.1)
    numbers = uniforms(0, 0, torch.arange(4_000), 0, op.num_uniforms)
    ours = op(colours.repeat(200, 1, 1, 1), params=op.draw(numbers)).unflatten(0, (200, 20))
    torch.manual_seed(0)
    jitter = TorchvisionJitter(0.4, 0.4, 0.4, 0.1)
    theirs = torch.stack([jitter(colours) for _ in range(200)])
    # 200 draws of torchvision's: a spread of 0.15 leaves 0.01 of error in a mean.
    torch.testing.assert_close(ours.mean((0, 1, 3, 4)), theirs.mean((0, 1, 3, 4)), atol=0.03, rtol=0)
    torch.testing.assert_close(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.05, atol=0)
    change, expected = (ours - colours).abs().mean(), (theirs - colours).abs().mean()
    torch.testing.assert_close(change, expected, rtol=0.05, atol=0)


def test_grey_equals_torchvision_and_pil(images):
    grey = Grayscale()(images)
    torch.testing.assert_close(grey, tv.rgb_to_grayscale(images, num_output_channels=3), atol=1e-6, rtol=0)
    bytes_ = (images[0] * 255).round().byte()
    pil = np.asarray(Image.fromarray(bytes_.permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(luminance(bytes_[None] / 255)[0, 0].numpy() * 255 - pil).max() < 1.0


def test_solarize_equals_torchvision_and_pil():
    ramp = torch.arange(256).expand(3, 1, 256)
    ours = Solarize()(ramp[None] / 255)[0]
    assert torch.equal(ours, tv.solarize(ramp / 255, 0.5))
    pil = ImageOps.solarize(Image.fromarray(ramp.byte().permute(1, 2, 0).numpy()), 128)
    np.testing.assert_allclose(ours[0] * 255, np.asarray(pil)[..., 0], atol=1e-4)

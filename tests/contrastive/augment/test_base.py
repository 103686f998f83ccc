import pytest
import torch
from kornia.augmentation import AugmentationSequential, ImageSequential
from torch import Tensor

from contrastive.augment.base import Intensity
from contrastive.augment.blur import GaussianBlur
from contrastive.augment.color import ColorJitter, Grayscale, Solarize
from contrastive.augment.corrupt import Erase, GaussianNoise, Occlude
from contrastive.augment.crop import Crop
from contrastive.augment.noise import uniforms


def ops(p):
    return [
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=p),
        Grayscale(p=p),
        GaussianBlur((0.1, 2.0), p=p),
        Solarize(p=p),
        GaussianNoise(0.1, p=p),
        Erase((0.02, 0.2), (0.0, 0.0, 0.0), p=p),
        Occlude((0.1, 0.4), p=p),
    ]


def name(op):
    return type(op).__name__


@pytest.fixture
def images():
    return torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def draw(op, count):
    return op.draw(uniforms(0, 0, torch.arange(count), 0, op.num_uniforms))


@pytest.mark.parametrize("op", ops(0.5), ids=name)
def test_only_chosen_images_change_and_the_input_never(op, images):
    before, params = images.clone(), draw(op, 32)
    views = op(images, params=params)
    changed = (views != before).flatten(1).any(1)
    assert torch.equal(images, before)
    assert torch.equal(changed, params["batch_prob"])
    assert 5 < changed.sum() < 27
    params["batch_prob"] = torch.ones(32)
    assert torch.equal(op(images, params=params)[changed], views[changed])


@pytest.mark.parametrize("op", ops(0.0), ids=name)
def test_off_is_the_identity(op, images):
    assert torch.equal(op(images, params=draw(op, 32)), images)
    assert torch.equal(op(images), images)


@pytest.mark.parametrize("op", [*ops(1.0), Crop(12), Crop(12, rotate=10.0)], ids=name)
def test_values_under_autocast_are_those_of_float32(op, images):
    params = op.draw(*_arguments(op))
    plain = op(images, params=dict(params))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = op(images, params=dict(params))
        halved = op(images.bfloat16(), params=dict(params))
    assert views.dtype == torch.float32
    assert torch.equal(views, plain)
    assert halved.dtype == torch.bfloat16
    assert (halved - plain).abs().mean() < 0.01


def _arguments(op) -> tuple[Tensor | int, ...]:
    numbers = uniforms(0, 0, torch.arange(32), 0, op.num_uniforms)
    return (numbers, 16, 16) if isinstance(op, Crop) else (numbers,)


@pytest.mark.parametrize("container", [AugmentationSequential, ImageSequential])
def test_composes_in_kornias_containers_and_replays(container, images):
    chain = container(Crop(12), *ops(0.5))
    torch.manual_seed(0)
    views = chain(images)
    assert views.shape == (32, 3, 12, 12)
    assert not torch.equal(chain(images), views)
    torch.manual_seed(0)
    assert torch.equal(chain(images), views)
    assert torch.equal(chain(images, params=chain._params), views)


class Shift(Intensity):
    num_uniforms = 2

    def __init__(self, p):
        super().__init__(p=p)
        self.seen = []

    def strengths(self, uniforms):
        return {"by": uniforms[:, 0]}

    def change(self, images, **strengths):
        self.seen.append(len(images))
        return images + strengths["by"][:, None, None, None]


def test_only_what_was_chosen_is_computed_and_overwritten(images):
    op, before = Shift(0.5), images.clone()
    params = draw(op, 32)
    shifted = before + params["by"][:, None, None, None]
    views = op.overwrite(images, params)
    assert op.seen == [int(params["batch_prob"].sum())]
    assert views is images
    assert torch.equal(views, torch.where(params["batch_prob"][:, None, None, None], shifted, before))

import math

import numpy as np
import pytest
import torch
from kornia.augmentation import AugmentationSequential
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from contrastive.augment.crop import Crop, crop_resize, draw_boxes
from contrastive.augment.noise import uniforms
from tests.reference import augment as reference

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def images(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def still(count, **changed):
    """Parameters of ``Crop`` for 12 px images that change nothing, but for ``changed``."""
    return {
        "box": torch.tensor([[0.0, 0, 12, 12]]).expand(count, 4),
        "flip": torch.zeros(count),
        "angle": torch.zeros(count),
        "shift": torch.zeros(count, 2),
        "shear": torch.zeros(count),
    } | changed


@pytest.mark.parametrize("size", [5, 12, 16])
def test_crop_resize_equals_the_reference(size):
    source = images(3, 12)
    boxes = [(0, 0, 12, 12), (2, 1, 7, 9), (11, 4, 1, 3)]
    ours = crop_resize(source, torch.tensor(boxes).float(), torch.tensor([False, True, True]), size)
    for image, box, flip, view in zip(source, boxes, (False, True, True), ours, strict=True):
        expected = reference.crop_resize(image.numpy(), box, flip, size)
        np.testing.assert_allclose(view, expected, atol=2e-6)


@pytest.mark.parametrize(("stored", "size"), [(32, 32), (48, 32), (40, 64), (224, 64)])
def test_crop_resize_equals_torchvision(stored, size):
    source = images(8, stored)
    boxes = draw_boxes(uniforms(0, 0, torch.arange(8), 0, 22), stored, stored, SCALE, RATIO)
    flips = torch.arange(8) % 2 == 0
    ours = crop_resize(source, boxes, flips, size)
    for image, box, flip, view in zip(source, boxes.int().tolist(), flips, ours, strict=True):
        left, top, width, height = box
        expected = tv.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        torch.testing.assert_close(
            view, tv.horizontal_flip(expected) if flip else expected, atol=5e-6, rtol=0
        )


def test_white_noise_shrinks_as_in_torchvision():
    source = images(4, 224)
    whole = torch.tensor([[0.0, 0, 224, 224]]).expand(4, 4)
    ours = crop_resize(source, whole, torch.zeros(4) > 0, 64).std()
    theirs = tv.resize(source, [64, 64], antialias=True).std()
    aliased = tv.resize(source, [64, 64], antialias=False).std()
    assert abs(ours / theirs - 1) < 0.01
    assert aliased / theirs > 2


def test_whole_box_at_equal_size_is_the_identity():
    source = images(2, 12)
    assert torch.equal(Crop(12)(source, params=still(2)), source)
    torch.testing.assert_close(Crop(12, rotate=9.0)(source, params=still(2)), source, atol=1e-5, rtol=0)


def test_boxes_are_distributed_as_torchvisions():
    """Moments of 10,000 draws: where whole pixels matter, and where many a box does not fit."""
    for height, width, scale in ((32, 32, (0.2, 1.0)), (200, 120, (0.5, 1.0))):
        ours = draw_boxes(uniforms(1, 0, torch.arange(10_000), 0, 22), height, width, scale, RATIO)
        torch.manual_seed(0)
        blank = torch.zeros(3, height, width)
        draws = [RandomResizedCrop.get_params(blank, list(scale), list(RATIO)) for _ in range(1_000)]
        theirs = torch.tensor([(left, top, w, h) for top, left, h, w in draws]).float()
        for moment in (_as_they_are, _area, _ratio):
            a, b = moment(ours), moment(theirs)
            error = (a.var(0) / 10_000 + b.var(0) / 1_000).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
            torch.testing.assert_close(a.std(0), b.std(0), rtol=0.1, atol=0)
        assert (ours == ours.round()).all()
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= width).all()
        assert (ours[:, 1] + ours[:, 3] <= height).all()


def _as_they_are(boxes):
    return boxes


def _area(boxes):
    return boxes[:, 2:3] * boxes[:, 3:]


def _ratio(boxes):
    return (boxes[:, 2:3] / boxes[:, 3:]).log()


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (30, 30)])
def test_boxes_that_never_fit_fall_back_to_torchvisions_central_one(height, width):
    scale = (1.0, 1.0)
    ratio = (3 / 4, 4 / 3) if height != width else (2.0, 3.0)
    ours = draw_boxes(uniforms(0, 0, torch.arange(4), 0, 22), height, width, scale, ratio)
    top, left, h, w = RandomResizedCrop.get_params(torch.zeros(3, height, width), list(scale), list(ratio))
    assert ours.tolist() == [[left, top, w, h]] * 4


@pytest.mark.parametrize(
    ("angle", "shift", "shear"),
    [(0.2, (0.0, 0.0), 0.0), (0.0, (0.1, -0.2), 0.0), (0.0, (0.0, 0.0), 0.3), (-0.4, (0.1, 0.0), 0.2)],
)
def test_motion_equals_the_reference(angle, shift, shear):
    source = images(1, 12)
    params = still(1, angle=torch.tensor([angle]), shift=torch.tensor([shift]), shear=torch.tensor([shear]))
    view = Crop(12, rotate=1.0)(source, params=params)
    np.testing.assert_allclose(view[0], reference.move(source[0].numpy(), angle, shift, shear), atol=1e-5)


def test_motion_turns_the_way_torchvision_does():
    source = images(1, 12)
    params = still(1, angle=torch.tensor([math.radians(20)]), shear=torch.tensor([math.radians(8)]))
    ours = Crop(12, rotate=1.0)(source, params=params)
    theirs = tv.affine(source, 20, [0, 0], 1.0, [8, 0], interpolation=tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_motion_follows_crop_and_flip():
    """Crop and flip alone through the look-up equal the separable way where nothing shrinks."""
    source = images(2, 12)
    params = still(2, box=torch.tensor([[2.0, 1, 8, 8], [3, 3, 6, 9]]), flip=torch.tensor([1.0, 0.0]))
    looked_up, separable = Crop(16, rotate=1.0)(source, params=params), Crop(16)(source, params=params)
    # At the box's rim the look-up sees the image beyond it, resizing a crop cannot.
    torch.testing.assert_close(looked_up[..., 2:-2, 2:-2], separable[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


def test_motion_of_larger_images_is_antialiased():
    source = images(4, 224)
    params = still(4, box=torch.tensor([[0.0, 0, 224, 224]]).expand(4, 4), angle=torch.full((4,), 1e-4))
    moved = Crop(64, rotate=1.0)(source, params=params)
    resized = tv.resize(source, [64, 64], antialias=True)
    torch.testing.assert_close(moved[..., 1:-1, 1:-1], resized[..., 1:-1, 1:-1], atol=2e-3, rtol=0)


def test_strengths_are_drawn_within_their_ranges():
    crop = Crop(32, flip=0.3, rotate=15.0, translate=0.1, shear=10.0)
    params = crop.draw(uniforms(0, 0, torch.arange(10_000), 0, crop.num_uniforms), 32, 32)
    assert abs(params["flip"].mean() - 0.3) < 0.023
    for name, limit in (("angle", math.radians(15)), ("shift", 0.1), ("shear", math.radians(10))):
        drawn = params[name]
        assert drawn.abs().max() <= limit
        assert abs(drawn.mean()) < 5 * limit / math.sqrt(3 * 10_000)
        assert abs(drawn.std() / (limit / math.sqrt(3)) - 1) < 0.03


def test_composes_in_kornia_and_tells_where_points_went():
    source = torch.zeros(2, 3, 24, 24)
    source[:, :, 9, 15] = 1
    crop = Crop(48, scale=(0.5, 1.0), flip=1.0, rotate=10.0)
    chain = AugmentationSequential(crop, data_keys=["input", "keypoints"])
    torch.manual_seed(0)
    views, points = chain(source, torch.tensor([[[15.0, 9.0]]] * 2))
    for view, point in zip(views, points, strict=True):
        grid = torch.stack(torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="xy"), dim=-1)
        centre = (grid * view[0, :, :, None]).sum((0, 1)) / view[0].sum()
        torch.testing.assert_close(centre, point[0], atol=0.15, rtol=0)


def test_pixels_outside_the_box_are_left_out_of_the_work_alone(monkeypatch):
    """Large images on a CPU are resampled one by one; boxes at the border and between pixels included."""
    from contrastive.augment import crop

    images = torch.rand(4, 3, 20, 30)
    box = torch.tensor([[0, 0, 30, 20], [3, 5, 9, 2], [29, 19, 1, 1], [2.5, 3.25, 8.5, 9.1]])
    flip = torch.tensor([True, False, True, False])
    whole = crop.crop_resize(images, box, flip, 12)
    monkeypatch.setattr(crop, "_SMALL", 0)
    torch.testing.assert_close(crop.crop_resize(images, box, flip, 12), whole, rtol=1e-5, atol=1e-6)

import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from contrastive.augment.noise import uniforms
from contrastive.augment.views import Chain, Views, center_view
from contrastive.config import AugmentConfig, DataConfig, PretrainConfig, ViewConfig
from contrastive.config_files import load_config
from tests.forked import run_forked

OFF = ViewConfig(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
FULL = ViewConfig(solarize=0.3, noise=0.5, erase=0.5, occlude=0.5)
MOVED = replace(FULL, rotate=15.0, translate=0.1, shear=10.0)
DATA = DataConfig(image_size=16)
IDS = torch.arange(40) * 10**9


def stored(count=40, size=18):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def normalized(images, data=DATA):
    return tv.normalize(images / 255, data.mean, data.std)


@pytest.mark.parametrize("view", [FULL, MOVED], ids=["separable", "moved"])
def test_views_do_not_depend_on_batch_or_order(view):
    views = Views(AugmentConfig(view, view), DATA, seed=3)
    whole = views(stored(), IDS, 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:7], order[:1]):
        for all_, some in zip(whole, views(stored()[rows], IDS[rows], 5), strict=True):
            assert torch.equal(all_[rows], some)


def test_views_do_not_depend_on_the_size_of_the_pieces(monkeypatch):
    views = Views(AugmentConfig(FULL, replace(MOVED, occlude_with="images")), DATA, seed=3)
    whole = views(stored(), IDS, 0)
    monkeypatch.setattr("contrastive.augment.views._CACHED_VALUES", 3 * 16 * 16 * 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, views(stored(), IDS, 0), strict=True))


def test_each_view_is_its_chain_on_its_own_numbers():
    views = Views(AugmentConfig(FULL, MOVED), DATA, seed=3)(stored(), IDS, 2)
    for number, config in enumerate((FULL, MOVED)):
        chain = Chain(config, DATA)
        assert torch.equal(views[number], chain(stored(), uniforms(3, 2, IDS, number, chain.num_uniforms)))


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_views_that_are_all_grey_have_equal_channels_and_can_be_changed_further(blur):
    grey = replace(OFF, grayscale=1.0, blur=blur)
    for view in Views(AugmentConfig(grey, grey), DATA, seed=0)(stored(), IDS, 0):
        pixels = view * torch.tensor(DATA.std).view(3, 1, 1) + torch.tensor(DATA.mean).view(3, 1, 1)
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5
        torch.testing.assert_close(pixels[:, 0], pixels[:, 2], atol=1e-5, rtol=0)


def test_seed_epoch_id_and_view_each_change_the_views():
    images = stored(1).expand(2, -1, -1, -1)
    first, second = Views(AugmentConfig(FULL, FULL), DATA, seed=0)(images, torch.tensor([1, 2]), 0)
    seen = [first[0], first[1], second[0], second[1]]
    seen.append(Views(AugmentConfig(FULL, FULL), DATA, seed=1)(images[:1], torch.tensor([1]), 0)[0][0])
    seen.append(Views(AugmentConfig(FULL, FULL), DATA, seed=0)(images[:1], torch.tensor([1]), 1)[0][0])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_the_global_generators_are_neither_read_nor_moved():
    views = Views(AugmentConfig(FULL, MOVED), DATA, seed=0)
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = views(stored(), IDS, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, views(stored(), IDS, 0), strict=True))


def test_everything_off_is_the_normalized_image():
    images = stored(size=16)
    for view in Views(AugmentConfig(OFF, OFF), DATA, seed=0)(images, IDS, 0):
        torch.testing.assert_close(view, normalized(images), atol=1e-6, rtol=0)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_values_under_autocast_are_those_of_float32():
    views = Views(AugmentConfig(FULL, MOVED), DATA, seed=0)
    plain = views(stored(), IDS, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, views(stored(), IDS, 0), strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip", 0.5),
        ("jitter", 0.8),
        ("grayscale", 0.3),
        ("blur", 0.5),
        ("solarize", 0.5),
        ("noise", 0.5),
        ("occlude", 0.5),
    ],
)
def test_switching_one_op_on_leaves_the_other_images_as_they_were(name, value):
    """Each op owns its random numbers: crops, for one, stay where they were."""
    crop_only = replace(OFF, crop_scale=[0.3, 0.9], crop_ratio=[0.75, 1.3])
    before, _ = Views(AugmentConfig(crop_only, OFF), DATA, seed=0)(stored(), IDS, 0)
    after, _ = Views(AugmentConfig(replace(crop_only, **{name: value}), OFF), DATA, seed=0)(stored(), IDS, 0)
    kept = (before == after).flatten(1).all(1).float().mean()
    assert abs(kept - (1 - value)) < 0.3
    assert 0 < kept < 1


def test_what_is_pasted_is_the_whole_other_image_at_the_same_place():
    view = replace(OFF, occlude=1.0, occlude_with="images", occlude_scale=[0.9, 0.9])
    images = stored(size=16)
    for pasted in Views(AugmentConfig(view, view), DATA, seed=0)(images, IDS, 0):
        same = (pasted[:, None] - normalized(images)[None]).abs().amax(2) < 1e-6  # (view, image, h, w)
        assert same.any(1).all()
        share = same.float().mean((2, 3))
        assert (share.diagonal() < 0.6).all()
        assert (share.fill_diagonal_(0).amax(1) > 0.4).all()


def test_a_chain_equals_torchvision_with_the_same_parameters():
    """Crop, flip, jitter, grey, blur and solarize, one image after the other."""
    view = replace(FULL, noise=0.0, erase=0.0, occlude=0.0)
    chain, images = Chain(view, DATA), stored(24)
    numbers = uniforms(0, 0, IDS[:24], 0, chain.num_uniforms)
    ours = chain(images, numbers)
    crop, jitter, grey, blur, solarize, *_ = chain.draw(numbers, 18, 18)
    for i, image in enumerate(images / 255):
        left, top, width, height = crop["box"][i].int().tolist()
        image = tv.resized_crop(image, top, left, height, width, [16, 16], antialias=True)
        if crop["flip"][i]:
            image = tv.horizontal_flip(image)
        if jitter["batch_prob"][i]:
            for name in ("brightness", "contrast", "saturation", "hue"):
                image = getattr(tv, f"adjust_{name}")(image, float(jitter[name][i]))
        if grey["batch_prob"][i]:
            image = tv.rgb_to_grayscale(image, 3)
        if blur["batch_prob"][i]:
            image = tv.gaussian_blur(image, [17, 17], [float(blur["sigma"][i])] * 2)
        if solarize["batch_prob"][i]:
            image = tv.solarize(image, 0.5)
        torch.testing.assert_close(ours[i], tv.normalize(image, DATA.mean, DATA.std), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("stored_size", "size", "box"), [(16, 16, 16), (24, 16, 24), (110, 96, 96), (160, 70, 140)]
)
def test_center_view_equals_torchvisions(stored_size, size, box):
    data, images = DataConfig(image_size=size), stored(3, stored_size)
    expected = tv.resize(tv.center_crop(images / 255, [box, box]), [size, size], antialias=True)
    view = center_view(images, data)
    torch.testing.assert_close(view, tv.normalize(expected, data.mean, data.std), atol=1e-5, rtol=0)
    assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("preset", ["moco_v2", "simclr", "byol_asymmetric", "cifar", "digits", "weak"])
def test_presets_load_and_give_finite_views(preset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {image_size: 16}\n")
    config = load_config(PretrainConfig, "pretrain", str(recipe), [f"augment={preset}"])
    first, second = Views(config.augment, config.data, config.run.seed)(stored(), IDS, 0)
    assert first.shape == second.shape == (40, 3, 16, 16)
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    alike = preset not in ("byol_asymmetric", "cifar")
    assert (asdict(config.augment.view_1) == asdict(config.augment.view_2)) == alike


@pytest.mark.slow
def test_the_whole_chain_compiles_without_a_graph_break():
    """fullgraph refuses whatever reads a tensor on the host, and an epoch that would have to be one."""
    run_forked(compile_the_chain, limit_s=300)


def compile_the_chain(number):
    warnings.simplefilter("error")
    everything = ViewConfig(solarize=0.5, noise=0.5, erase=0.5)
    moved = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0, rotate=9.0, shear=9.0, translate=0.1)
    images, ids = torch.randint(0, 256, (8, 3, 18, 18), dtype=torch.uint8), torch.arange(8)
    augment = AugmentConfig(everything, moved)
    plain, compiled = Views(augment, DATA, seed=1), Views(augment, DATA, seed=1, compile="eager")
    crops = torch.randint(0, 256, (8, 2 * 16 * 16 * 3), dtype=torch.uint8)
    for given in (images, crops):
        for one, other in zip(plain(given, ids, 3), compiled(given, ids, 3), strict=True):
            assert other.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    numbers = torch.compile(uniforms, fullgraph=True, backend="eager")
    for epoch in range(4):
        assert torch.equal(numbers(1, epoch, ids, 0, 9), uniforms(1, epoch, ids, 0, 9))


def test_local_views_follow_the_global_ones_and_change_nothing_of_them():
    plain = Views(AugmentConfig(FULL, MOVED), DATA, seed=3)(stored(), IDS, 2)
    config = AugmentConfig(
        FULL, MOVED, num_local=2, local=replace(FULL, crop_scale=[0.05, 0.4]), local_size=8
    )
    views = Views(config, DATA, seed=3)(stored(), IDS, 2)
    assert [tuple(view.shape) for view in views] == [(40, 3, 16, 16)] * 2 + [(40, 3, 8, 8)] * 2
    assert all(torch.equal(one, other) for one, other in zip(views[:2], plain, strict=True))
    for number in (2, 3):
        chain = Chain(config.local, DATA, 8)
        assert torch.equal(views[number], chain(stored(), uniforms(3, 2, IDS, number, chain.num_uniforms)))


def test_global_views_of_another_size_show_the_same_boxes():
    views = Views(AugmentConfig(FULL, MOVED, global_size=8, num_local=1), DATA, seed=3)(stored(), IDS, 2)
    assert [view.shape[-1] for view in views] == [8, 8, 8]
    chain = Chain(FULL, DATA, 8)
    assert torch.equal(views[0], chain(stored(), uniforms(3, 2, IDS, 0, chain.num_uniforms)))
    assert AugmentConfig(global_size=8, num_local=1, local_size=12).sizes(16) == {8, 12}
    assert AugmentConfig(first_size=8).sizes(16) == {8, 16}
    assert AugmentConfig().sizes(16) == {16}


@pytest.mark.parametrize(("image_size", "side"), [(224, 96), (96, 40), (32, 16), (16, 8)])
def test_local_views_have_three_sevenths_of_the_side_unless_told(image_size, side):
    assert AugmentConfig().local_side(image_size) == side
    assert AugmentConfig(local_size=12).local_side(image_size) == 12


def test_disjoint_views_share_no_pixel_and_cover_all_halves():
    """Each image's pixels are its columns and rows, so that a view shows where it was cut."""
    places = torch.arange(18, dtype=torch.uint8) * 14
    columns, rows = torch.meshgrid(places, places, indexing="xy")
    images = torch.stack([columns, rows, torch.zeros_like(rows)]).expand(40, 3, 18, 18)
    whole = replace(OFF, crop_scale=[0.2, 1.0], crop_ratio=[0.5, 2.0])
    plain = DataConfig(image_size=16, mean=[0.0] * 3, std=[1.0] * 3)
    first, second = Views(AugmentConfig(whole, whole, disjoint=True), plain, seed=3)(images, IDS, 2)
    halves = set()
    for one, other in zip(first, second, strict=True):
        apart = [
            (axis, bool(one[axis].max() < other[axis].min()), bool(other[axis].max() < one[axis].min()))
            for axis in (0, 1)
        ]
        halves |= {(axis, before) for axis, before, after in apart if before or after}
        assert any(before or after for _, before, after in apart)
    assert halves == {(0, True), (0, False), (1, True), (1, False)}

"""Views of clips: every frame of a clip is changed alike."""

from dataclasses import replace

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from contrastive.augment.base import _KORNIA_OWN
from contrastive.augment.blur import GaussianBlur
from contrastive.augment.color import ColorJitter, Grayscale, Solarize
from contrastive.augment.corrupt import Erase, GaussianNoise
from contrastive.augment.crop import Crop
from contrastive.augment.views import Views, center_view, encode_center
from contrastive.config import AugmentConfig, DataConfig
from tests.contrastive.augment import test_views
from tests.contrastive.augment.test_views import FULL, IDS, MOVED, OFF, stored

FRAMES = 3
DATA = replace(test_views.DATA, frames=FRAMES)


def clips(views=2):
    """Return clips of 20 rows, for each view one after the other."""
    return stored(20 * views * FRAMES).unflatten(0, (20, views * FRAMES))


@pytest.mark.parametrize("view", [FULL, MOVED], ids=["separable", "moved"])
def test_each_frame_is_changed_as_the_image_of_its_row_would_be(view):
    views = Views(AugmentConfig(view, view), DATA, seed=3)
    both = views(clips(), IDS[:20], 5)
    for frame in range(FRAMES):
        for number, whole in enumerate(both):
            alone = views(clips()[:, number * FRAMES + frame].contiguous(), IDS[:20], 5)[number]
            assert torch.equal(whole[:, frame], alone)


def test_two_moments_of_a_video_become_images():
    data, moments = replace(DATA, frames=1), clips()[:, :2]
    both = Views(AugmentConfig(FULL, MOVED), data, seed=3)(moments, IDS[:20], 5)
    for number, view in enumerate(both):
        alone = Views(AugmentConfig(FULL, MOVED), data, seed=3)(moments[:, number].contiguous(), IDS[:20], 5)
        assert torch.equal(view, alone[number])


def test_local_views_are_cut_from_the_clips_of_both_views_in_turn():
    augment = AugmentConfig(OFF, OFF, num_local=3, local=OFF, local_size=16)
    views = Views(augment, DATA, seed=0)(clips(), IDS[:20], 0)
    assert [view.shape for view in views] == [(20, FRAMES, 3, 16, 16)] * 5
    assert torch.equal(views[2], views[0])
    assert torch.equal(views[3], views[1])
    assert torch.equal(views[4], views[0])


def test_views_of_clips_do_not_depend_on_the_size_of_the_pieces(monkeypatch):
    views = Views(AugmentConfig(FULL, MOVED), DATA, seed=3)
    whole = views(clips(), IDS[:20], 0)
    monkeypatch.setattr("contrastive.augment.views._CACHED_VALUES", 3 * 16 * 16 * 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, views(clips(), IDS[:20], 0), strict=True))


@pytest.mark.parametrize(
    "op",
    [
        Crop(16, scale=(0.3, 1.0)),
        Crop(16, rotate=20.0, translate=0.1, shear=10.0),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.7),
        Grayscale(p=0.5),
        GaussianBlur((0.1, 2.0), p=0.5),
        Solarize(p=0.5),
        GaussianNoise(0.1, p=0.5),
        Erase((0.1, 0.3), (0.5, 0.4, 0.3), p=0.5),
    ],
    ids=["crop", "moved", "jitter", "grey", "blur", "solarize", "noise", "erase"],
)
def test_a_container_for_videos_of_kornia_gives_the_same(op):
    """``VideoSequential(same_on_frame=True)`` draws for each clip and repeats for its frames."""
    torch.manual_seed(0)
    given = clips(1).float() / 255
    container = K.VideoSequential(op, data_format="BTCHW", same_on_frame=True)
    expected = container(given)
    drawn = {name: value for name, value in container._params[0].data.items() if name not in _KORNIA_OWN}
    for value in drawn.values():  # once a clip
        assert (value.view(20, FRAMES, -1) == value.view(20, FRAMES, -1)[:, :1]).all()
    alike = {name: value[::FRAMES].repeat_interleave(FRAMES, 0) for name, value in drawn.items()}
    flat = given.flatten(0, 1)
    found = op.apply_transform(flat, alike, {}) if isinstance(op, Crop) else op.overwrite(flat.clone(), alike)
    torch.testing.assert_close(found.unflatten(0, (20, FRAMES)), expected, rtol=0, atol=1e-6)
    assert (expected[..., :16, :16] != given[..., :16, :16]).any()


class Brightness(nn.Module):
    """A network whose feature tells clips and the order of frames apart."""

    def forward(self, x):
        weights = torch.arange(1.0, x.shape[1] + 1)
        return (x.mean((2, 3, 4)) * weights).sum(1, keepdim=True)


def test_a_video_has_the_mean_of_its_clips_features():
    data = replace(DATA, frames=FRAMES)
    centre = center_view(clips(), data)
    assert torch.equal(centre[:, 4], center_view(clips()[:, 4].contiguous(), data))
    found = encode_center(Brightness(), clips(), data)
    both = [Brightness()(centre[:, start : start + FRAMES]) for start in (0, FRAMES)]
    torch.testing.assert_close(found, (both[0] + both[1]) / 2)
    assert not torch.allclose(both[0], both[1])


def test_images_are_encoded_as_before():
    pooled = encode_center(nn.Flatten(), stored(), DataConfig(image_size=16))
    assert torch.equal(pooled, center_view(stored(), DATA).flatten(1))

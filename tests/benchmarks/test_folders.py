"""The made-up folders: icons by context, textures whose class is a band and an orientation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(file)


def test_icons_are_sorted_by_context_and_hand(load: Any, tmp_path: Path) -> None:
    themes, out = tmp_path / "themes", tmp_path / "out"
    for place in (
        "gnome/32x32/apps/mail.png",
        "gnome/48x48/apps/mail.png",
        "gnome/16x16/apps/mail.png",  # another size
        "gnome/32x32/animations/wait.png",  # no context
        "oxygen/base/32x32/apps/mail.png",
        "other/32x32/apps/mail.png",  # no theme of ours
    ):
        write(themes / place)
    (themes / "gnome/32x32/apps/lost.png").symlink_to("elsewhere.png")
    (themes / "gnome/32x32/apps/post.png").symlink_to("mail.png")
    load("folders").make_icons(themes, out)
    made = sorted(str(file.relative_to(out)) for file in out.rglob("*.png"))
    assert made == [
        "test/apps/oxygen-32x32-mail.png",
        "train/apps/gnome-32x32-mail.png",
        "train/apps/gnome-32x32-post.png",
        "train/apps/gnome-48x48-mail.png",
    ]
    with Image.open(out / made[0]) as icon:
        assert icon.mode == "RGBA"


@pytest.mark.parametrize(("band", "angle"), [("coarse", 0), ("middle", 45), ("fine", 135)])
def test_a_texture_has_its_energy_in_its_band_and_direction(load: Any, band: str, angle: int) -> None:
    folders = load("folders")
    power = np.zeros((64, 64))
    for seed in range(20):
        pixels = np.asarray(folders.texture(band, angle, np.random.default_rng(seed)), dtype=float)
        assert pixels.shape == (64, 64, 3)
        power += np.abs(np.fft.fft2(pixels[..., 1] - pixels[..., 1].mean())) ** 2
    y, x = np.unravel_index(power.argmax(), power.shape)
    y, x = (int(each + 32) % 64 - 32 for each in (y, x))
    low, high = folders.SPECTRA[band]
    assert low <= np.hypot(x, y) <= high
    assert abs((np.degrees(np.arctan2(y, x)) - angle + 90) % 180 - 90) < 30

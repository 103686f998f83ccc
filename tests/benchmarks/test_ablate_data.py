from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def data(load: Any) -> Any:
    return load("ablate_data")


def folder(tmp_path: Path, per_class: int) -> Path:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "source" / part / name
            place.mkdir(parents=True)
            for number in range(per_class):
                (place / f"{number}.png").write_bytes(b"x")
    return tmp_path / "source"


def names(place: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in place.glob("*/*")}


@pytest.mark.parametrize("per_class", [6, None])
def test_temperatures_are_chosen_on_training_images_that_are_not_fitted(
    data: Any, tmp_path: Path, per_class: int | None
) -> None:
    source, made = folder(tmp_path, 10), tmp_path / "made"
    data.prepare(data.Classes(per_class, None, 3), source, made)
    trained, fitted = names(made / "images/train"), names(made / "validation/train")
    scored = names(made / "validation/test")
    assert len(trained) == data.count_images(made) == 2 * (per_class or 10)
    assert len(scored) == 2 * 3
    assert fitted == trained - scored
    assert names(made / "test/train") == trained
    assert names(made / "test/test") == names(source / "test")
    assert (made / "images/train/cat").is_dir()
    assert all(
        path.resolve().parent == source / "train/cat" for path in (made / "images/train/cat").iterdir()
    )


def test_classes_of_falling_sizes_are_fitted_on_equal_ones(data: Any, tmp_path: Path) -> None:
    source, made = folder(tmp_path, 10), tmp_path / "made"
    data.prepare(data.Classes((6, 1), 4, 3), source, made)
    sizes = {place: len(list((made / place).iterdir())) for place in ("images/train/cat", "images/train/dog")}
    assert sizes == {"images/train/cat": 6, "images/train/dog": 1}
    assert {len(list((made / f"test/train/{name}").iterdir())) for name in ("cat", "dog")} == {4}


def test_links_are_made_anew_when_asked_for_others(data: Any, tmp_path: Path) -> None:
    source, made = folder(tmp_path, 10), tmp_path / "made"
    data.prepare(data.Classes(4, None, 2), source, made)
    few = names(made / "images/train")
    (made / "kept").touch()
    data.prepare(data.Classes(4, None, 2), source, made)
    assert (made / "kept").exists()
    data.prepare(data.Classes(8, None, 2), source, made)
    assert few < names(made / "images/train")  # and the smaller subset is part of the larger one
    assert not (made / "kept").exists()


def test_too_few_images_are_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds 10 images, the preset takes 9 to train on and 2 others"):
        data.prepare(data.Classes(9, None, 2), folder(tmp_path, 10), tmp_path / "made")


@pytest.fixture
def outfits(tmp_path: Path) -> Path:
    root = tmp_path / "outfits"
    (root / "frames").mkdir(parents=True)
    for name, colour in (("0", "red"), ("1", "blue")):
        Image.new("RGB", (8, 8), colour).save(root / "frames" / f"{name}.png")
    for identity in range(4):
        for name in (
            f"train/{identity:05d}/0.png",
            f"test/{identity:05d}/0.png",
            f"test/{identity:05d}/1.png",
        ):
            (root / "identities" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "identities" / name).touch()
    return root


def test_identities_that_choose_are_not_reported_on(data: Any, outfits: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    data.prepare(data.Outfits(outfits=None, variants=0, validation=2), outfits, made)
    assert data.count_images(made) == 2
    assert names(made / "validation/train") == {"00000/0.png", "00001/0.png"}
    assert names(made / "test/train") == {"00002/0.png", "00003/0.png"}
    assert len(names(made / "test/test")) == 4


def test_variants_of_a_frame_are_its_class(data: Any, outfits: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    data.prepare(data.Outfits(outfits=1, variants=4, validation=2), outfits, made)
    assert names(made / "images/train") == {f"0/{at}.png" for at in range(5)}
    assert data.count_images(made) == 5
    for image in (made / "images/train/0").iterdir():
        red, green, blue = np.asarray(Image.open(image)).mean((0, 1))
        assert red > 200 > 60 > max(green, blue)

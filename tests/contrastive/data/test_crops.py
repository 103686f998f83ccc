import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resized_crop

from contrastive.augment.boxes import DrawBoxes
from contrastive.augment.views import Views
from contrastive.config import AugmentConfig, DataConfig, UserError, ViewConfig
from contrastive.data.arrays import ArrayImages, DecodedImages
from contrastive.data.crops import CroppedImages, cut_into, draw_crops
from contrastive.data.decode import Unreadable
from contrastive.data.files import open_tree
from contrastive.data.loader import build_loader, choose_crop, is_resident
from contrastive.data.plan import Plan, Share
from contrastive.data.torch_dataset import DatasetImages
from contrastive.data.wrapped import SomeImages
from tests import tiny

CROP = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0)
LOCAL = replace(CROP, crop_scale=[0.05, 0.4])
DATA = DataConfig(image_size=16, mean=[0.0] * 3, std=[1.0] * 3, crop="original")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
BOXES = torch.tensor([[3, 5, 40, 20], [0, 0, 56, 40], [50, 9, 6, 7]])


def encoded(pixels, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def smooth(width, height):
    """Return a picture with detail of eight pixels and more, different at each side."""
    coarse = np.random.default_rng(1).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def cut(original, boxes, sides):
    views = torch.zeros(sum(3 * side**2 for side in sides), dtype=torch.uint8)
    asked = []

    def draw(height, width):
        asked.append((height, width))
        return boxes.float()

    cut_into(views, original, draw, sides)
    parts = views.split([3 * side**2 for side in sides])
    return [part.view(side, side, 3).permute(2, 0, 1) for part, side in zip(parts, sides, strict=True)], asked


def expected(pixels, boxes, sides):
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return [
        resized_crop(image, top, left, height, width, [side, side], antialias=True)
        for (left, top, width, height), side in zip(boxes.tolist(), sides, strict=True)
    ]


def stored():
    return ArrayImages("some", [PIXELS], 16)


def cropped(augment, images=None, epoch=2):
    boxes = DrawBoxes(augment, DATA, seed=3)
    return draw_crops(images or stored(), DATA, boxes, boxes.sides).in_epoch(epoch)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "grey", "array"])
def test_equals_torchvisions_resized_crop(kind):
    pixels, sides = PIXELS[0, :40], [24, 16, 8]
    if kind == "grey":
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    file = Image.fromarray(pixels) if kind == "array" else encoded(pixels, "PNG" if kind == "PNG" else "JPEG")
    known = file if kind == "array" else Image.open(io.BytesIO(file.getvalue()))
    found, asked = cut(file, BOXES, sides)
    assert asked == [(40, 56)]
    for view, other in zip(found, expected(known.convert("RGB"), BOXES, sides), strict=True):
        assert (view.int() - other.int()).abs().max() <= 1  # rounded by fixed-point arithmetic
    assert kind == "array" or file.closed


def test_crops_have_the_white_of_their_source(tmp_path):
    Image.fromarray(np.full((20, 30), 4095, np.uint16)).save(tmp_path / "a.png")
    images = open_tree(tmp_path, 16)
    images.white = 4095
    assert cropped(AugmentConfig(), images).read(0).unique().tolist() == [255]


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("side", [16, 48])
def test_turned_and_scaled_files_give_the_upright_picture(orientation, side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(smooth(400, 320), quality=95, exif=exif)
    upright = decode_whole(file)
    size = upright.shape[1::-1]
    box = torch.tensor([[30, 60, size[0] - 50, size[1] - 70]])
    (found,), asked = cut(file, box, [side])
    assert asked == [size[::-1]]
    (known,) = expected(upright, box, [side])
    assert (found.float() - known.float()).abs().mean() < 2


def decode_whole(file):
    from PIL import ImageOps

    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))))


@pytest.mark.parametrize(("side", "factor"), [(160, 1), (80, 2), (79, 2), (81, 1), (40, 4), (19, 8)])
def test_a_file_is_scaled_while_every_view_keeps_twice_its_side(side, factor, monkeypatch):
    seen, file = [], encoded(smooth(400, 320))
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *a, **k: seen.append(self.width) or resize(self, *a, **k)
    )
    whole = torch.tensor([[0, 0, 400, 320]])
    cut(file, whole.expand(2, 4), [side, 8])
    assert {*seen} == ({400 // factor} if factor > 1 else set())


@pytest.mark.parametrize("damage", [b"", b"no image", "truncated"])
def test_unreadable_files_have_the_reason_of_other_readers(damage, tmp_path):
    whole = encoded(PIXELS[0]).getvalue()
    for number, content in enumerate((whole, whole[: len(whole) // 2] if damage == "truncated" else damage)):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    images = open_tree(tmp_path, 16)
    found = cropped(AugmentConfig(CROP, CROP), images)
    pixels = torch.zeros(2, *found.shape, dtype=torch.uint8)
    bad = found.read_into(pixels, [1, 0])
    assert bad == images.read_into(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), [1, 0])
    assert [*bad] == [1]
    assert pixels[1].any()


@pytest.mark.parametrize("first_size", [None, 8, 24])
@pytest.mark.parametrize("disjoint", [False, True])
def test_views_are_those_of_the_whole_picture(disjoint, first_size):
    turned = replace(CROP, crop_ratio=[0.9, 1.1], crop_scale=[0.3, 0.6])
    augment = AugmentConfig(
        CROP, turned, num_local=2, local=LOCAL, local_size=8, disjoint=disjoint, first_size=first_size
    )
    ids, images = torch.arange(4), torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    crops = cropped(augment)
    packed = torch.stack([crops.read(row) for row in range(4)])
    whole, views = Views(augment, DATA, 3), Views(augment, DATA, 3)
    assert views.sides == [max(first_size or 0, 16)] * 2 + [8, 8]
    for known, view in zip(whole(images, ids, 2), views(packed, ids, 2), strict=True):
        assert view.shape == known.shape
        rounded = 1.01 / 255 if first_size != 24 or view.shape[-1] == 8 else 0.25
        assert (view - known).abs().max() < rounded
    if first_size is not None:
        first = Views(augment, DATA, 3, first_half=True)(packed, ids, 2)
        assert [view.shape[-1] for view in first] == [first_size, first_size, 8, 8]


def test_moved_views_are_cut_before_they_are_moved():
    moved = AugmentConfig(replace(CROP, rotate=20.0, shear=10.0, translate=0.1), CROP)
    crops = cropped(moved)
    packed = torch.stack([crops.read(row) for row in range(4)])
    first, _ = Views(moved, DATA, 3)(packed, torch.arange(4), 2)
    larger = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    known, _ = Views(moved, DATA, 3)(larger, torch.arange(4), 2)
    assert (first - known).abs().max() < 1.01 / 255


def test_crops_are_a_function_of_seed_epoch_and_row():
    augment = AugmentConfig(CROP, CROP)
    crops = cropped(augment)
    pixels = torch.zeros(3, *crops.shape, dtype=torch.uint8)
    assert crops.read_into(pixels, [2, 0, 3]) == {}
    assert all(pixels[at].equal(crops.read(row)) for at, row in enumerate([2, 0, 3]))
    assert not crops.read(0).equal(crops.in_epoch(3).read(0))
    other = CroppedImages(stored(), DrawBoxes(augment, DATA, seed=4), crops.sides, 2)
    assert not crops.read(0).equal(other.read(0))
    some = cropped(augment, SomeImages(stored(), torch.tensor([3, 1])))
    assert not some.read(0).equal(crops.read(3))  # its row is another
    assert crops.read_into(pixels[:0], []) == {}


def loaded(folder, *, workers=0, batch=4, world=1, start=0):
    """Return the pixels of each row in each epoch, as the loaders of all ranks give them."""
    images = cropped(AugmentConfig(CROP, CROP, num_local=1, local=LOCAL, local_size=8), open_tree(folder, 16))
    data, found = replace(DATA, num_workers=workers), {}
    plan = Plan(len(images), 0, batch, 2)
    for rank in range(world):
        loader = build_loader(
            images, plan, data, device=torch.device("cpu"), share=Share(rank, world), on_corrupt=print
        )
        loader.load_state_dict({"delivered": start})
        for step, loaded in enumerate(loader, start):
            for row, pixels in zip(loaded.ids.tolist(), loaded.images, strict=True):
                found[plan.epoch_of(step), row] = pixels.clone()
        loader.close()
    return found


@pytest.mark.parametrize("other", [{"workers": 2}, {"batch": 2}, {"world": 2}, {"start": 3}])
def test_crops_do_not_depend_on_how_they_are_loaded(other, tmp_path):
    tiny.write_images(tmp_path, 8, size=(40, 56))
    known, found = loaded(tmp_path), loaded(tmp_path, **other)
    assert len(found) == (4 if "start" in other else 16)
    assert all(pixels.equal(known[place]) for place, pixels in found.items())
    assert not known[0, 0].equal(known[1, 0])


def test_what_views_are_cut_from(tmp_path, monkeypatch):
    tiny.write_images(tmp_path, 2)
    files, large = open_tree(tmp_path, 110), DataConfig(image_size=96, resident="false")
    squares = DecodedImages("some", torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert choose_crop(files, large) == "original"
    assert choose_crop(SomeImages(files, torch.tensor([1])), large) == "original"
    assert choose_crop(DatasetImages([], 110), large) == "original"
    assert choose_crop(squares, large) == "square"
    for settings in ({"image_size": 64}, {"cache": "x"}, {"resident": "auto"}, {"crop": "square"}):
        assert choose_crop(files, replace(large, **settings)) == "square"
    assert choose_crop(files, replace(large, image_size=64, resident="auto", crop="original")) == "original"
    with pytest.raises(
        UserError, match=r"data.crop=original: data.name=digits gives squares alone \(Decoded"
    ):
        choose_crop(squares, replace(large, crop="original"))
    assert is_resident(files, DataConfig())
    assert not is_resident(cropped(AugmentConfig(CROP, CROP)), DataConfig())


@pytest.mark.parametrize("kept", [{"cache": "x"}, {"resident": "true"}])
def test_nothing_is_kept_of_crops(kept):
    with pytest.raises(ValueError, match=r"data.crop=original and data.(cache=x|resident=true)"):
        DataConfig(crop="original", **kept)


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (1, 1)])
def test_halves_of_a_line_have_pixels(height, width):
    draw = DrawBoxes(AugmentConfig(CROP, CROP, disjoint=True), DATA, 0)
    for boxes in draw(torch.arange(64), 0):
        left, top, wide, tall = boxes(height, width).unbind(1)
        assert (wide > 0).all()
        assert (tall > 0).all()
        assert (left + wide <= width).all()
        assert (top + tall <= height).all()


def test_an_image_without_pixels_is_unreadable():
    with pytest.raises(Unreadable, match=r"no pixels \(0x5\)"):
        DatasetImages([Image.new("RGB", (0, 5))], 16).read(0)

"""Test the pictures and measures of Gallery; W&B is tested in test_wandb.py."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from contrastive.augment.boxes import DrawBoxes
from contrastive.augment.views import Views, center_view
from contrastive.config import AugmentConfig, DataConfig
from contrastive.data.arrays import ArrayImages
from contrastive.data.crops import CroppedImages
from contrastive.drawing.figures import class_colour
from contrastive.module import ContrastiveModule, LastBatch
from memory_bank.negatives import Negatives
from memory_bank.sharded import ShardedBank


@pytest.fixture
def gallery():
    from contrastive.callbacks import gallery

    return gallery


@pytest.fixture
def four_images():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    return ArrayImages("noise", [pixels], 8)


def module_with(**attributes):
    """A module that has these attributes."""
    module = create_autospec(ContrastiveModule, instance=True)
    for name, value in attributes.items():
        vars(module)[name] = value
    return module


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [
        (3, -1, [10, 20, 30]),
        (45, -1, [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 330, 360, 390, 420, 450]),
        (3, 17, [10, 17]),
    ],
)
def test_pictures_are_due_about_twenty_times_and_at_the_end(gallery, epochs, max_steps, expected):
    from pytorch_lightning import Trainer

    plan = SimpleNamespace(steps_per_epoch=10, epochs=epochs, total_steps=10 * epochs)
    module, trainer = module_with(plan=plan), create_autospec(Trainer, instance=True)
    trainer.max_steps = max_steps
    last = max_steps if max_steps > 0 else plan.total_steps
    assert [step for step in range(1, last + 1) if gallery.picture_due(trainer, module, step)] == expected


def test_views_are_measured_against_those_of_other_images(gallery, four_images, tmp_path, monkeypatch):
    first, second = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1)).unbind()
    asked = []

    def views(images, ids, epoch):
        asked.append((ids.tolist(), epoch))
        return first, second

    plan = SimpleNamespace(epoch_of=lambda step: step // 10)
    monkeypatch.setattr(gallery, "Views", lambda *_: views)
    config = SimpleNamespace(augment=AugmentConfig(), data=DataConfig(), run=SimpleNamespace(seed=0))
    module = module_with(plan=plan, device=torch.device("cpu"), config=config)
    found = gallery.Gallery(four_images, tmp_path, 16)._measure_views(module, 30)
    assert asked == [([0, 1, 2, 3], 2)]  # step 30 was the last of epoch 2, counted from 0
    own = np.mean([np.mean((first[i] - second[i]).numpy() ** 2) for i in range(4)])
    others = np.mean([np.mean((first[i] - second[i - 1]).numpy() ** 2) for i in range(4)])
    assert float(found["views/distance"]) == pytest.approx(own / others, rel=1e-5)
    values = np.concatenate([first.numpy().ravel(), second.numpy().ravel()])
    assert float(found["views/std"]) == pytest.approx(values.std(ddof=1), rel=1e-5)


def test_crops_of_the_original_are_shown_as_training_sees_them(gallery, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3)).astype(np.uint8)
    data = DataConfig(image_size=8, crop="original")
    config = SimpleNamespace(augment=AugmentConfig(), data=data, run=SimpleNamespace(seed=3))
    module, images = module_with(config=config, device=torch.device("cpu")), ArrayImages("noise", [pixels], 8)
    boxes = DrawBoxes(config.augment, data, 3)
    crops = torch.stack([*map(CroppedImages(images, boxes, boxes.sides, 2).read, range(4))])
    known = Views(config.augment, data, 3)(crops, torch.arange(4), 2)
    found = gallery.Gallery(images, tmp_path, 4)._views(module, 2)
    assert all(view.equal(other) for view, other in zip(found, known, strict=True))


def test_what_the_step_compiles_meets_no_batch_but_the_steps(gallery, four_images, tmp_path):
    """Pictures are of other sizes, and made before the first step: their views are the same, uncompiled."""
    config = SimpleNamespace(
        augment=AugmentConfig(), data=DataConfig(image_size=8), run=SimpleNamespace(seed=3)
    )
    plan = SimpleNamespace(epoch_of=lambda step: 0)
    module = module_with(config=config, plan=plan, device=torch.device("cpu"))  # it has no views to call
    shown = gallery.Gallery(four_images, tmp_path, 4)
    assert shown._measure_views(module, 1)["views/distance"] > 0
    shown._draw_views(module)
    images = torch.stack([four_images.read(row) for row in range(4)])
    first, second = Views(config.augment, config.data, 3)(images, torch.arange(4), 0)
    rows = torch.cat([center_view(images, config.data), first, second]).unflatten(0, (3, 4))
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    pixels = ((rows * std + mean).clamp(0, 1) * 255).round()
    drawn = torch.tensor(np.array(Image.open(tmp_path / "views.png"))).permute(2, 0, 1)
    for row in range(3):
        for column in range(4):
            top, left = 2 + 10 * row, 2 + 10 * column  # images of 8 px, 2 px apart
            part = drawn[:, top : top + 8, left : left + 8]
            torch.testing.assert_close(part.float(), pixels[row, column], rtol=0, atol=1)


def test_views_of_another_size_are_drawn_as_large_as_images(gallery, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    config = SimpleNamespace(
        augment=AugmentConfig(global_size=8), data=DataConfig(image_size=16), run=SimpleNamespace(seed=3)
    )
    module = module_with(config=config, device=torch.device("cpu"))
    gallery.Gallery(ArrayImages("noise", [pixels], 16), tmp_path, 4)._draw_views(module)
    drawn = np.array(Image.open(tmp_path / "views.png"))
    assert drawn.shape == (3 * 18 + 2, 4 * 18 + 2, 3)
    view = drawn[20:36, 2:18]  # the first view of the first image: each pixel is four
    assert (view == view[::2, ::2].repeat(2, 0).repeat(2, 1)).all()
    assert view.std() > 0


def test_an_image_whose_two_views_are_negatives_is_listed_once(gallery):
    """The batch's negatives of SimCLR: rows 5, 6 and 7 by two views each, and a query's own left out."""
    angles = torch.tensor([0.0, 0.0, 0.3, 0.2, 0.1, 0.4])
    shared = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[-torch.inf, -torch.inf, 0.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([5, 5, 6, 6, 7, 7])
    negatives = replace(Negatives.none(query), shared=shared, shared_log_weight=weight, shared_ids=ids)
    batch = LastBatch(torch.tensor([5]), query, negatives)
    found = [(rank, row, round(score, 4)) for _, rank, row, score in gallery.hardest(batch, 4, 8)]
    assert found == [(0, 7, round(math.cos(0.1), 4)), (1, 6, round(math.cos(0.2), 4))]
    assert [row for _, _, row, _ in gallery.hardest(batch, 4, 1)] == [7]


def test_the_map_of_a_sharded_bank_waits_for_no_other_rank(gallery, four_images, tmp_path):
    """Rank 1 of 2 holds rows 1 and 3, 5, ...; their labels colour the dots."""

    class Alone:
        rank, world = 1, 2

        def gather(self, *_):
            raise AssertionError("this waits for the other ranks")

        swap = total = gather

    bank = ShardedBank(20, 4, dtype=torch.float16, device=torch.device("cpu"), max_age=None, exchange=Alone())
    keys = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(2)))
    bank.write(keys, torch.arange(20), 0)
    labels = torch.tensor([0 if row % 2 == 0 else 1 + row % 3 for row in range(20)])
    blank = [np.zeros((20, 8, 8, 3), np.uint8)]
    images = ArrayImages("blank", blank, 8, labels=labels, classes=[*"abcd"])
    gallery.Gallery(images, tmp_path, 4)._draw_bank(module_with(miner=SimpleNamespace(bank=bank)), 1)
    drawn = np.array(Image.open(tmp_path / "bank.png"))[:, :840].reshape(-1, 3)
    shown = {tuple(pixel) for pixel in np.unique(drawn, axis=0).tolist()} - {(255, 255, 255)}
    assert shown == {ImageColor.getrgb(class_colour(label, 4)) for label in (1, 2, 3)}
    assert [path.name for path in tmp_path.iterdir()] == ["bank.png"]

from dataclasses import fields

import pytest
import torch

from contrastive.data.batch import Batch


def test_no_labels_on_the_training_path():
    assert [field.name for field in fields(Batch)] == ["images", "ids"]


def test_moved_as_one():
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([5, 6]))
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.ids.device.type) == ("meta", "meta")
    assert (len(batch), batch.ids.tolist()) == (2, [5, 6])


@pytest.mark.parametrize(
    ("images", "ids"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_shapes_and_types_are_checked(images, ids):
    with pytest.raises(TypeError):
        Batch(images, ids)

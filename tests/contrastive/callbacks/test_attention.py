"""Pictures of attention during training: W&B is tested in test_wandb.py."""

import pytest
import pytorch_lightning as pl
import torch

from contrastive.callbacks import attention
from contrastive.callbacks.attention import AttentionPictures
from contrastive.config import UserError
from contrastive.data.torch_dataset import DatasetImages
from tests import tiny


class Noise(torch.utils.data.Dataset):
    """Random images; some cannot be read."""

    def __init__(self, torn=()):
        self.torn = torn

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row in self.torn:
            raise OSError("torn")
        return torch.randint(
            0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(row)
        )


@pytest.fixture
def trainer():
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def test_pictures_leave_training_alone():
    module = tiny.module()
    module.encoder.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    pictures = AttentionPictures(DatasetImages(Noise(torn=(0,)), 16), 1, count=4).draw(module)
    assert len(pictures) == 3  # of rows 3, 6 and 9
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3
    assert module.encoder.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(UserError, match="none of 2 images can be read"):
        AttentionPictures(DatasetImages(Noise(torn=(0, 9)), 16), 1, count=2).draw(module)


def test_they_are_sent_at_their_interval_while_there_is_a_w_and_b_run(trainer, monkeypatch):
    sent, run = [], object()
    monkeypatch.setattr(attention, "log_media", lambda trainer, media: sent.append(media))
    monkeypatch.setattr(attention, "wandb_run", lambda loggers: run)
    module = tiny.module()
    callback = AttentionPictures(DatasetImages(Noise(), 16), 2, count=3)
    for epochs in (1, 2, 3, 4):
        callback.on_epoch(trainer, module, epochs)
    assert [[*media] for media in sent] == [["views/attention"]] * 2
    assert len(sent[0]["views/attention"]) == 3
    run = None
    callback.on_epoch(trainer, module, 6)
    assert len(sent) == 2


def test_a_network_without_maps_is_named_once_and_training_continues(trainer, monkeypatch, caplog):
    monkeypatch.setattr(attention, "log_media", lambda *_: pytest.fail("a picture"))
    monkeypatch.setattr(attention, "wandb_run", lambda loggers: object())
    module = tiny.module("encoder.stem=imagenet")
    callback = AttentionPictures(DatasetImages(Noise(), 16), 1)
    for epochs in (1, 2):
        callback.on_epoch(trainer, module, epochs)
    [line] = [record.message for record in caplog.records if "pictures of attention" in record.message]
    assert "single position" in line

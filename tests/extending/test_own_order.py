"""Train in your own order: the image at each position of an epoch, as a pure function."""

from dataclasses import dataclass

import pytest
import torch

from contrastive.config import UserError
from contrastive.data.dataset import open_dataset
from contrastive.data.order.base import Order
from contrastive.data.order.global_ import GlobalOrder
from contrastive.lightning_glue import StepCallback
from contrastive.pretrain import pretrain
from contrastive.registry import ORDERS
from tests import tiny
from tests.contrastive.callbacks.fits import quiet

pytestmark = quiet


@dataclass(frozen=True)
class ByClass(Order):
    """Shuffle, then sort by class: each batch holds images of one class, or of two neighbouring ones.

    Attributes:
        labels: Class of each row.
        shuffled: Order within a class.
    """

    labels: torch.Tensor
    shuffled: GlobalOrder

    def ids(self, epoch, start, stop):
        rows = self.shuffled.ids(epoch, 0, len(self.labels))
        return rows[self.labels[rows].argsort(stable=True)][start:stop]


def by_class(images, config):
    return ByClass(images.labels, GlobalOrder(len(images), config.run.seed))


class NoteIds(StepCallback):
    """Keep the rows of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch.ids)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setitem(ORDERS, "by_class", f"{__name__}:by_class")
    small = ["data.image_size=8", "data.global_batch=64", "logging.mined_rows=0", "logging.every_n_steps=1"]
    quiet = ["logging.progress=false", "logging.wandb.mode=disabled", "logging.knn_every_epochs=0"]
    short = ["logging.probe_every_epochs=0", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    return [*small, *quiet, *short, f"run.root={tmp_path}", "run.name=sorted"]


def test_batches_come_in_the_order_that_the_config_names(settings):
    note = NoteIds()
    config = tiny.config(*settings, "data.order=by_class", "trainer.max_steps=4")
    code, _ = pretrain(config, callbacks=[note])
    assert code == 0
    images = open_dataset(config.data).train
    expected = by_class(images, config)
    assert [ids.tolist() for ids in note.seen] == [
        expected.ids(0, 64 * step, 64 * (step + 1)).tolist() for step in range(4)
    ]
    classes = [{*images.labels[ids].tolist()} for ids in note.seen]
    assert classes[0] == classes[1] == {0}
    with pytest.raises(UserError, match=r"data.order was 'by_class', is 'global'"):
        pretrain(tiny.config(*settings))

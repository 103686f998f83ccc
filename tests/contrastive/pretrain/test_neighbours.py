"""Whole runs whose batches are composed from the bank."""

import pytest
import torch

from contrastive.config import UserError
from contrastive.data.order.global_ import GlobalOrder
from contrastive.data.order.neighbours import NeighbourOrder
from contrastive.lightning_glue import StepCallback
from contrastive.pretrain import pretrain
from tests import tiny
from tests.contrastive.callbacks.fits import quiet

pytestmark = quiet


class Note(StepCallback):
    """Keep the rows of each batch, and the bank after each epoch."""

    def __init__(self):
        self.seen, self.keys = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += batch.ids.tolist()

    def on_epoch(self, trainer, module, epochs):
        bank = module.miner.bank
        self.keys.append((bank.key.clone(), bank.id >= 0))


@pytest.fixture
def run(tmp_path):
    tiny.write_images(tmp_path / "photos", 44)

    def call(*overrides):
        note = Note()
        config = tiny.run_config(
            tmp_path, "data.name=images", f"data.root={tmp_path / 'photos'}", "data.image_size=16",
            "method=simclr", "data.order=neighbours", "data.neighbours.group=4", "data.neighbours.width=5",
            "schedule.epochs=3", "mining.class_prior=0", *overrides,
        )  # fmt: skip
        assert pretrain(config, callbacks=[note])[0] == 0
        return config, note

    return call


def test_each_epoch_is_composed_from_the_bank_at_the_end_of_the_one_before(run):
    config, note = run()
    order = NeighbourOrder(44, config.run.seed, config.data.neighbours, 0.0)
    expected = [GlobalOrder(44, config.run.seed).ids(0, 0, 40)]
    expected += [order.compose(epoch, *note.keys[epoch - 1])[:40] for epoch in (1, 2)]
    assert note.seen == torch.cat(expected).tolist()
    assert not note.keys[0][1].all()  # the rows that the first epoch left out
    assert [len(set(note.seen[at : at + 40])) for at in (0, 40, 80)] == [40] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_ahead_stops_where_the_next_epoch_is_not_composed_yet(run, workers):
    _, resident = run("data.resident=true")
    _, decoded = run("run.name=decoded", "data.resident=false", f"data.num_workers={workers}")
    assert decoded.seen == resident.seen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bank.kind=queue", "bank.capacity=44"], r"bank\.kind=queue .*use bank\.kind=dataset"),
        (["bank.placement=sharded"], r"bank\.placement=sharded no process has the keys"),
        (["method=moco", "mining.query=stored"], r"mining\.query=stored cannot look the next epoch up"),
    ],
)
def test_what_leaves_the_order_without_keys_is_refused(run, overrides, message):
    with pytest.raises(UserError, match=message):
        run(*overrides)

"""Test the text of the warning of a collapse; whole runs test when it comes."""

import logging

import pytest
import torch
from pytorch_lightning import Trainer

from contrastive.callbacks.watch_health import WatchHealth
from tests import tiny
from tests.contrastive.callbacks.fits import quiet

pytestmark = quiet

HARD = "All negatives are hard ones: set mining.num_uniform=5 (mining.num_hard) or mining=mix first. Lower"


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["mining=hardest", "mining.num_hard=5", "mining.num_uniform=0"], f"of 1. {HARD}"),
        (["mining=mix"], "of 1. Lower optimizer.base_lr"),
        (["mining=full_bank", "mining.num_uniform=0"], "of 1. Lower optimizer.base_lr"),
        (["mining=hardest", "mining.num_uniform=0", "method=simclr"], "of 1. Lower optimizer.base_lr"),
    ],
)
def test_a_collapse_under_hard_negatives_alone_names_uniform_ones_first(overrides, remedy, caplog):
    module = tiny.module(*overrides, fill=False)
    keys = torch.nn.functional.normalize(torch.ones(40, 8) + 0.01 * torch.randn(40, 8), dim=1)
    module.miner.write(keys, torch.arange(40), 0)
    trainer = Trainer(accelerator="cpu", logger=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        WatchHealth().on_epoch(trainer, module, 1)
    (record,) = caplog.records
    assert "collapse of the embeddings after epoch 1: " in record.getMessage()
    assert remedy in record.getMessage()

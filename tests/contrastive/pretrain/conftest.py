"""The command line end to end, in this process, on small images made here."""

import json
import shutil

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return tiny.write_classes(tmp_path_factory.mktemp("photos"), 16, size=(20, 24))


@pytest.fixture
def folder(photos, tmp_path):
    """48 images in three classes, told apart by colour; the test's own."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Call the command with a tiny recipe; returns exit code, the JSON of the last line, stderr."""

    from contrastive.__main__ import main

    def call(*overrides):
        code = main(
            [
                "data.name=imagefolder",
                f"data.root={folder}",
                "data.image_size=16",
                *tiny.SETTINGS,
                "mining.min_fill=0.2",
                "schedule.epochs=3",
                "schedule.warmup_epochs=1",
                *tiny.QUIET,  # a test of monitors asks for them
                f"run.root={tmp_path / 'runs'}",
                "run.name=tiny",
                "run.checkpoint_every=null",
                "trainer.accelerator=cpu",
                *overrides,
            ]
        )
        out, err = capsys.readouterr()
        result = json.loads(out.strip().splitlines()[-1]) if code in (0, 3, 75) and out.strip() else None
        return code, result, err

    return call


@pytest.fixture
def alerts(monkeypatch):
    """Title and text of what W&B would tell people."""
    from contrastive import fitting
    from contrastive.callbacks import watcher

    sent = []
    for module in (fitting, watcher):
        monkeypatch.setattr(module, "alert", lambda trainer, title, text: sent.append((title, text)))
    return sent


@pytest.fixture
def moves(monkeypatch):
    """Record for each step whether weights or statistics changed; only then must the bank be written."""
    from contrastive.module import ContrastiveModule

    step, seen = ContrastiveModule.optimizer_step, []

    def watched(self, *args, **kwargs):
        before = [value.clone() for value in self.state_dict().values()]
        step(self, *args, **kwargs)
        seen.append(not all(map(torch.equal, before, self.state_dict().values())))
        assert seen[-1] == (len(seen) - 1 in self.miner.bank.written_at)

    monkeypatch.setattr(ContrastiveModule, "optimizer_step", watched)
    return seen


@pytest.fixture
def scale_loss(monkeypatch):
    """Lightning has no 16-mixed on a CPU: it is bf16-mixed with a loss scale."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    made = MixedPrecision.__init__

    def by(scaler):
        def make(self, *args):
            made(self, *args)
            self.scaler = scaler

        monkeypatch.setattr(MixedPrecision, "__init__", make)

    return by

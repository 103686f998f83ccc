"""Add your own data source: a function with a name that configs and command lines can use."""

import numpy as np
import pytest
import torch

from contrastive.config import PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.arrays import ArrayImages
from contrastive.data.dataset import Dataset
from contrastive.pretrain import pretrain
from contrastive.registry import DATASETS
from eval.evaluate import evaluate
from eval.protocol import find_protocol
from eval.report.write import ReportEvaluation, write_report
from tests.contrastive.callbacks.fits import quiet
from tests.tiny import SETTINGS

pytestmark = quiet

opened = []


def open_stripes(data):
    """Return images with horizontal or vertical stripes of random phase: 40 to train on, 20 to score on."""
    opened.append(data.root)
    rng = np.random.default_rng(0)

    def part(name, count):
        labels = torch.arange(count) % 2
        waves = 120 + 100 * np.sin(np.arange(16) + rng.uniform(0, 6, (count, 1)))
        grey = np.broadcast_to(waves[:, :, None], (count, 16, 16)).copy()
        grey[labels == 1] = grey[labels == 1].transpose(0, 2, 1)
        pixels = np.repeat((grey + rng.normal(0, 20, grey.shape)).clip(0, 255)[..., None], 3, axis=3)
        return ArrayImages(
            f"stripes/{name}",
            [pixels.astype(np.uint8)],
            data.stored_size,
            labels=labels,
            classes=["horizontal", "vertical"],
        )

    train = part("train", 40)
    return Dataset(train, train, part("test", 20))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", f"{__name__}:open_stripes")
    opened.clear()
    own = ["data.name=stripes", "data.root=here", "data.image_size=16", "schedule.epochs=2"]
    scored = ["schedule.warmup_epochs=0", "logging.knn_every_epochs=1", "logging.probe_every_epochs=1"]
    quiet = ["logging.progress=false", "logging.wandb.mode=disabled"]
    given = [*SETTINGS, *own, *scored, *quiet, f"run.root={tmp_path}", "run.name=stripes"]
    code, summary = pretrain(load_config(PretrainConfig, "pretrain", "digits", given))
    assert code == 0
    assert {"knn/top1", "probe/top1"} <= {*summary["metrics"]}
    return tmp_path / "stripes"


def test_a_source_is_used_by_its_name_and_opened_once_a_run(run):
    assert opened == ["here"]  # by the training and by its monitors
    assert "stripes/train/7" in (run / "manifest.csv").read_text()


@pytest.mark.parametrize("protocol", ["knn", "stats"])
def test_an_evaluation_opens_the_same_source_once(run, protocol):
    opened.clear()
    given = [f"checkpoint={run}", "device=cpu", "progress=false"]
    result = evaluate(protocol, load_config(find_protocol(protocol).config, "eval", protocol, given))
    assert opened == ["here"]
    assert result["data"]["rows"] == {"train": 40, "test": 20}
    assert result["data"]["name"] == "stripes"


def test_a_report_opens_the_same_source_once(run):
    opened.clear()
    written = write_report(
        load_config(ReportEvaluation, "eval", "report", [f"checkpoint={run}", "device=cpu"])
    )
    assert (opened, written["missing"]) == (["here"], [])

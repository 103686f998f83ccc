"""Pretrain on your own torch Dataset, resume, and evaluate, from Python."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torch.utils.data import Dataset as TorchDataset

from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import load_config
from contrastive.data.dataset import Dataset
from contrastive.data.torch_dataset import DatasetImages
from contrastive.pretrain import pretrain
from eval.evaluate import evaluate
from eval.knn import KnnEvaluation
from tests.contrastive.callbacks.fits import quiet
from tests.tiny import SETTINGS

pytestmark = quiet

CLASSES = ["disc", "square", "bar"]


class Shapes(TorchDataset):
    """Bright shapes at random places on dark noise."""

    def __init__(self, count, seed):
        self.labels = [number % len(CLASSES) for number in range(count)]
        self.seed = seed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        label, rng = self.labels[row], np.random.default_rng([self.seed, row])
        image = Image.fromarray(rng.integers(0, 60, (16, 16, 3), dtype=np.uint8))
        left, top = (int(place) for place in rng.integers(0, 8, 2))
        width = 2 if CLASSES[label] == "bar" else 7
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if CLASSES[label] == "disc" else draw.rectangle
        shape((left, top, left + width, top + 7), fill=tuple(rng.integers(120, 256, 3).tolist()))
        return image, label


def labelled(shapes):
    return DatasetImages(shapes, 16, labels=shapes.labels, classes=CLASSES)


def configure(folder, *overrides):
    own = ["data.image_size=16", "schedule.epochs=4", "schedule.warmup_epochs=0", "logging.mined_rows=2"]
    quiet = ["logging.progress=false", "logging.wandb.mode=disabled"]
    given = [*SETTINGS, *own, *quiet, f"run.root={folder}", "run.name=shapes", *overrides]
    return load_config(PretrainConfig, "pretrain", "digits", given)


def evaluation(folder):
    given = [f"checkpoint={folder / 'shapes'}", "device=cpu", "progress=false", "knn.k=[5]"]
    return load_config(KnnEvaluation, "eval", "knn", given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run that was stopped after 10 of its 24 steps, and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    images = labelled(Shapes(48, seed=0))
    code, summary = pretrain(configure(folder, "trainer.max_steps=10"), images=images)
    assert (code, summary["steps"]) == (0, 10)
    code, summary = pretrain(configure(folder), images=images)
    assert (code, summary["steps"], summary["finished"]) == (0, 24, True)
    assert "knn/top1" in summary["metrics"]  # scored during the run, by the data set's labels
    return folder


def test_the_resumed_run_ends_as_the_uninterrupted_one(run, tmp_path):
    code, _ = pretrain(configure(tmp_path), images=Shapes(48, seed=0))  # monitors and labels change nothing
    assert code == 0
    encoders = [folder / "shapes" / "encoder.safetensors" for folder in (run, tmp_path)]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()


def test_the_encoder_is_evaluated_on_images_given_from_python(run):
    train, test = labelled(Shapes(48, seed=0)), labelled(Shapes(30, seed=1))
    result = evaluate("knn", evaluation(run), dataset=Dataset(train, train, test))
    assert result["data"]["rows"] == {"train": 48, "test": 30}
    assert result["data"]["classes"] == CLASSES
    assert result["scores"][0]["encoder"]["value"] > 0.5  # by chance 1/3


def test_other_images_of_the_same_number_are_not_mistaken_for_those_cached(run):
    train = labelled(Shapes(48, seed=0))
    results = [
        evaluate("knn", evaluation(run), dataset=Dataset(train, train, labelled(Shapes(30, seed=seed))))
        for seed in (1, 2)
    ]
    fingerprints = [result["data"]["fingerprint"] for result in results]
    assert fingerprints[0]["train"] == fingerprints[1]["train"]
    assert fingerprints[0]["test"] != fingerprints[1]["test"]


def test_an_evaluation_does_not_silently_open_another_data_set(run):
    assert "  name: dataset\n" in (run / "shapes" / "config.yaml").read_text()
    with pytest.raises(
        UserError, match=r"data.name and data.root .* evaluate\(protocol, config, dataset=..."
    ):
        evaluate("knn", evaluation(run))


def test_a_resume_on_a_data_set_of_another_length_is_refused(run):
    with pytest.raises(UserError, match=r"the data changed since this run began: 2 added \(dataset/48"):
        pretrain(configure(run), images=Shapes(50, seed=0))

"""A run directory as pretraining leaves it, and features to score."""

import csv
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def digits():
    """Raw pixels of scikit-learn's digits in the project's own split, as Features."""
    from contrastive.config import DataConfig
    from contrastive.data.dataset import open_dataset
    from eval.features import Features, PartFeatures

    dataset = open_dataset(DataConfig(image_size=8))

    def split(images):
        pixels = torch.stack([images.read(row)[0].flatten().float() for row in range(len(images))])
        return PartFeatures(pixels, images.labels, torch.arange(len(images)))

    return Features(split(dataset.train), split(dataset.test), tuple(dataset.train.classes))


@pytest.fixture(scope="session")
def clusters():
    """Gaussian classes that overlap, along correlated dimensions of very different scale."""
    from eval.features import Features, PartFeatures

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 20, generator=generator) * 0.9
    mix = torch.randn(20, 20, generator=generator) * torch.logspace(-2, 2, 20)

    def split(count):
        labels = torch.randint(6, (count,), generator=generator)
        rows = centres[labels] + torch.randn(count, 20, generator=generator)
        return PartFeatures(rows @ mix, labels, torch.arange(count))

    return Features(split(3000), split(2000), tuple("abcdef"))


def make_run(folder: Path, **changes) -> Path:
    """Config, encoder with moved batch statistics, metrics, views and mined negatives."""
    from contrastive.config import DataConfig, EncoderConfig, PretrainConfig
    from contrastive.config_files import to_yaml
    from contrastive.encoders.build import build_encoder
    from contrastive.encoders.spec import InputSpec
    from contrastive.encoders.weights import save_encoder

    data = DataConfig(**({"image_size": 16, "mean": [0.3] * 3, "std": [0.35] * 3} | changes))
    config = PretrainConfig(data=data, encoder=EncoderConfig(name="resnet10", width=8))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    encoder = build_encoder(config.encoder, data.image_size)
    encoder(torch.randn(32, 3, 16, 16))  # batch statistics leave their initial values
    save_encoder(folder / "encoder.safetensors", encoder, InputSpec.of(data), {"step": "10"})
    return folder


def add_pictures(run: Path) -> None:
    """What the report draws."""
    from PIL import Image

    names = [
        "step",
        "epoch",
        "train/loss",
        "train/lr",
        "mining/positive_similarity",
        "mining/similarity_mean",
    ]
    rows = [[1, 0.5, 5.2, 0.1, 0.5, 0.3], [2, 1.0, 4.1, 0.2, "nan", 0.2], [3, 1.5, 3.5, 0.1, 0.7, ""]]
    with (run / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    header = ["anchor_row", "anchor_key", "rank", "negative_row", "negative_key", "similarity"]
    far = "photos/of/a/long/summer/c.png"
    mined = [[0, "<b>&a.png", 0, 1, "b.png", 0.91], [0, "<b>&a.png", 1, 2, far, 0.42]]
    with (run / "mined.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *mined])
    Image.new("RGB", (48, 48), (200, 80, 20)).save(run / "views.png")


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A run directory that tests read only (its cache may fill)."""
    run = make_run(tmp_path_factory.mktemp("runs") / "shared")
    add_pictures(run)
    return run


@pytest.fixture
def new_run(tmp_path):
    """Makes run directories of the test's own."""
    return lambda **changes: make_run(tmp_path / "own", **changes)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

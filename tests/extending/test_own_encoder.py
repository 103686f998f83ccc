"""Train your own encoder: passed to ``pretrain``, or named in the registry."""

import pytest
import torch
from torch import nn

from contrastive.config import UserError
from contrastive.config_files import load_config
from contrastive.encoders.encoder import Encoder, encode_map
from contrastive.encoders.weights import load_encoder
from contrastive.pretrain import pretrain
from contrastive.registry import ENCODERS
from eval.evaluate import evaluate
from eval.knn import KnnEvaluation
from tests import tiny

# Warnings of Lightning, which the command line hides.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

STEPS = ("schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.max_steps=3", "trainer.accelerator=cpu")
QUIET = ("logging.probe_every_epochs=0", "logging.knn_every_epochs=0", "logging.progress=false")


class SmallCnn(Encoder):
    """Two convolutions; no batch norm."""

    def __init__(self, channels=8):
        super().__init__()
        self.dim = channels
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )

    def encode(self, x):
        features = self.body(x)
        return encode_map(features.mean((2, 3)), features)


def build(name, image_size, *, channels=8):
    """Build the encoder from ``encoder.name`` and ``encoder.args``; the registry names this function."""
    return SmallCnn(channels)


def config(folder, *overrides):
    return tiny.config(
        f"run.root={folder}", "run.name=own", "logging.wandb.mode=disabled", *STEPS, *QUIET, *overrides
    )


def images(size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path):
    """Return a run of an encoder that was passed in, and that encoder."""
    folder, encoder = tmp_path, SmallCnn()
    before = encoder.body[0].weight.detach().clone()
    code, _ = pretrain(config(folder), encoder=encoder)
    assert code == 0
    assert not torch.equal(encoder.body[0].weight, before)
    return folder / "own", encoder


def test_its_file_fills_a_fresh_instance(run):
    path, trained = run[0] / "encoder.safetensors", run[1].eval()
    trained.to(memory_format=torch.contiguous_format)  # training rearranges convolutions
    loaded, info = load_encoder(path, encoder=SmallCnn())
    assert torch.equal(loaded(images()), trained(images()))
    assert str(info.arch) == "own:SmallCnn"
    with pytest.raises(
        UserError, match=r"own, SmallCnn, .*load_encoder\(path, encoder=SmallCnn\(\)\) or evaluate"
    ):
        load_encoder(path)
    with pytest.raises(UserError, match=r"body\.0\.weight is \[8, 3, 3, 3\], the network has \[9,"):
        load_encoder(path, encoder=SmallCnn(9))


def test_it_is_evaluated(run):
    checkpoint = str(run[0])
    settings = load_config(
        KnnEvaluation, "eval", "knn", [f"checkpoint={checkpoint}", "progress=false", "device=cpu"]
    )
    result = evaluate("knn", settings, encoder=SmallCnn())
    top1 = result["scores"][0]
    assert top1["encoder"]["value"] > 0.3
    assert top1["encoder"]["value"] != top1["random_encoder"]["value"]  # the instance, as it was passed in
    assert result["encoder"]["name"] == "own:SmallCnn"
    with pytest.raises(UserError, match="pass it in Python"):
        evaluate("knn", settings)


def test_through_the_registry_it_is_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "small_cnn", f"{__name__}:build")
    named = config(tmp_path, "encoder.name=small_cnn", "encoder.args={channels: 6}")
    code, _ = pretrain(named)
    assert code == 0
    loaded, info = load_encoder(tmp_path / "own" / "encoder.safetensors")
    assert loaded(images()).shape == (2, 6)
    assert (info.arch.name, info.arch.args) == ("small_cnn", {"channels": 6})
    with pytest.raises(UserError, match=r"encoder\.args\.chanels: .*did you mean 'channels'\?"):
        pretrain(config(tmp_path, "run.name=b", "encoder.name=small_cnn", "encoder.args.chanels=6"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("dim", r"pooled features of 2 images are \(2, 8\), its dim is 9; set self\.dim"),
        ("encode", "encode returns a Tensor; return an Encoded"),
        ("size", r"cannot encode images of 16 px \(.*\); change data\.image_size"),
    ],
)
def test_a_wrong_one_is_refused_before_anything_is_written(tmp_path, monkeypatch, broken, message):
    encoder = SmallCnn()
    if broken == "dim":
        encoder.dim = 9
    elif broken == "encode":
        monkeypatch.setattr(SmallCnn, "encode", lambda self, x: self.body(x).mean((2, 3)))
    else:
        encoder.body.append(nn.Flatten()).append(nn.Linear(3, 8))
    with pytest.raises(UserError, match=message):
        pretrain(config(tmp_path), encoder=encoder)
    assert not [*tmp_path.iterdir()]


def test_a_resumed_run_draws_the_dropout_of_an_uninterrupted_one(tmp_path):
    def train(name, steps):
        torch.manual_seed(0)
        encoder = SmallCnn()
        encoder.body.append(nn.Dropout(0.5))
        code, _ = pretrain(
            config(tmp_path, f"run.name={name}", f"trainer.max_steps={steps}"), encoder=encoder
        )
        assert code == 0
        return (tmp_path / name / "encoder.safetensors").read_bytes()

    whole = train("whole", 3)
    train("parts", 1)
    assert train("parts", 3) == whole

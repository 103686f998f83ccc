"""Add your own evaluation protocol from a program outside of this project."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from contrastive.config import DataConfig, EncoderConfig
from contrastive.encoders.build import build_encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import save_encoder
from eval.__main__ import main
from eval.config import EvalConfig, EvalDataConfig
from eval.evaluate import evaluate
from eval.frozen import resolve
from eval.knn import KnnEvaluation
from eval.protocol import Scoring, accuracy_titles
from eval.registry import PROTOCOLS
from eval.report.read import read_run
from eval.scores import Scored, accuracy_line
from eval.subject import Extractor
from memory_bank.config import check_above_zero


@dataclass
class NcmConfig:
    """The protocol's own settings. The distance of a mean is the sum of ``|difference| ** power``."""

    power: float = 2.0

    def __post_init__(self):
        check_above_zero("ncm.power", self.power)


@dataclass
class NcmEvaluation(EvalConfig):
    """The settings that all protocols share, and its own in a field of its name."""

    ncm: NcmConfig = field(default_factory=NcmConfig)


def score(features, config):
    """Give each test image the class whose mean of training features is the nearest."""
    train, test = features.train, features.test
    means = torch.stack([train.features[train.labels == c].mean(0) for c in range(len(features.classes))])
    distance = (test.features[:, None] - means).abs().pow(config.ncm.power).sum(2)
    return Scored([accuracy_line("top1", (distance.argmin(1) == test.labels)[None])], details={})


PROTOCOL = Scoring(NcmEvaluation, score, title="Nearest class mean")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "ncm", f"{__name__}:PROTOCOL")


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """Write a tiny untrained network to a file that belongs to no run."""
    config, data = EncoderConfig(name="resnet10", width=8), DataConfig(image_size=16)
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(file, build_encoder(config, 16), InputSpec.of(data), {})
    return file


def settings(file, **changes):
    return NcmEvaluation(
        str(file), data=EvalDataConfig(name="digits"), device="cpu", progress=False, **changes
    )


def by_loops(config, power):
    """Return the top-1 of the same rule, computed row by row in NumPy."""
    features = Extractor(config, resolve(config.checkpoint)).features("encoder")
    (train, labels), (test, truth) = (
        (part.features.double().numpy(), part.labels.numpy()) for part in (features.train, features.test)
    )
    means = [np.mean([row for row, c in zip(train, labels, strict=True) if c == k], 0) for k in range(10)]
    hits = 0
    for row, label in zip(test, truth, strict=True):
        hits += int(np.argmin([np.sum(np.abs(row - mean) ** power) for mean in means])) == label
    return hits / len(truth)


def test_its_number_equals_a_loop_and_stands_beside_the_baselines(encoder_file):
    result = evaluate("ncm", settings(encoder_file))
    (row,) = result["scores"]
    assert row["encoder"]["value"] == pytest.approx(by_loops(settings(encoder_file), 2), abs=1e-9)
    assert row["raw_pixels"]["value"] > row["encoder"]["value"] > 0.3
    gain = row["encoder"]["value"] - row["random_encoder"]["value"]
    assert row["random_encoder"]["gain"]["value"] == pytest.approx(gain, abs=1e-6)

    shown = read_run(encoder_file.parent, "tiny").own.results["ncm"]  # by a report
    assert shown.scores[0].value == row["encoder"]["value"]
    assert accuracy_titles()["ncm"] == "Nearest class mean"


def test_it_runs_from_the_command_line_with_settings_of_its_own(encoder_file, capsys):
    given = [f"checkpoint={encoder_file}", "data.name=digits", "device=cpu", "progress=false"]
    assert main(["ncm", *given, "ncm.power=1"]) == 0
    shown = capsys.readouterr()
    result = json.loads((encoder_file.parent / "eval" / "ncm.json").read_text())
    assert json.loads(shown.out)["top1"] == pytest.approx(by_loops(settings(encoder_file), 1), abs=1e-9)
    assert result["settings"]["ncm"] == {"power": 1.0}
    assert "top1" in shown.err


@pytest.mark.parametrize(
    ("protocol", "override", "message"),
    [
        ("ncm", "ncm.powr=1", "unknown key 'ncm.powr'; did you mean 'ncm.power'?"),
        ("ncm", "ncm.power=0", "ncm.power=0.0: more than 0 is needed"),
        ("ncm", "knn.k=[5]", "'knn.k=[5]': is a setting of knn, this is ncm"),
        ("knn", "ncm.power=1", "'ncm.power=1': is a setting of ncm, this is knn"),
    ],
)
def test_its_settings_are_checked(protocol, override, message, encoder_file, capsys):
    assert main([protocol, f"checkpoint={encoder_file}", override]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_it(capsys):
    assert main(["--help"]) == 0
    assert "\n  ncm\n" in capsys.readouterr().out


def test_plain_settings_stand_for_its_defaults_and_those_of_another_protocol_are_refused(encoder_file):
    shared = EvalConfig(str(encoder_file), data=EvalDataConfig(name="digits"), device="cpu", progress=False)
    assert evaluate("ncm", shared)["settings"]["ncm"] == {"power": 2.0}
    with pytest.raises(ValueError, match="settings are a KnnEvaluation; give a NcmEvaluation"):
        evaluate("ncm", KnnEvaluation("x"))

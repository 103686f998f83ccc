"""Runs from start to end: what they leave, log and measure."""

import fnmatch
import math
import multiprocessing
import re

import pytest
import torch

from contrastive.callbacks.online import monitor_split
from contrastive.callbacks.profile import PARTS
from contrastive.config import PretrainConfig
from contrastive.config_files import load_saved
from contrastive.data.dataset import open_dataset
from contrastive.data.encoded import FileImages
from contrastive.data.wrapped import SomeImages
from contrastive.encoders.weights import load_encoder
from contrastive.logging.names import METRICS, describe
from contrastive.methods.moco import Moco
from contrastive.momentum import momentum_at
from contrastive.optim import learning_rate
from contrastive.step_guard import Diverged
from eval import knn, linear_probe
from eval.features import Features, PartFeatures, extract
from memory_bank.miner import Miner
from tests import tiny
from tests.contrastive.pretrain.runs import metrics, same, table, weights


def test_a_run_leaves_the_directory_that_the_readme_describes(run, tmp_path):
    code, result, err = run(*tiny.MONITORED)
    run_dir = tmp_path / "runs" / "tiny"
    assert code == 0
    assert result["finished"]
    assert err.count("dataset bank of 38 x 8; exact search") == 1
    assert "no negatives are taken" not in err
    names = {path.name for path in run_dir.iterdir()}
    expected = {"config.yaml", "manifest.csv", "metrics.csv", "mined.csv", "views.png", "summary.json"}
    assert expected | {"encoder.safetensors", "checkpoints"} <= names
    rows = metrics(run_dir)
    steps = [int(float(row["step"])) for row in rows if row["train/loss"]]
    assert steps == list(range(1, result["steps"] + 1))
    for column in ("train/loss", "train/lr", "mining/positive_similarity", "bank/fill", "perf/images_per_s"):
        assert column in rows[0], column
    assert float(rows[-1]["bank/fill"]) > 0.5
    assert "knn/top1" in rows[0]
    mined = table(run_dir / "mined.csv")
    assert mined
    assert all(row["anchor_row"] != row["negative_row"] for row in mined)


@pytest.mark.parametrize(("more", "is_read"), [([], False), (["data.order=neighbours"], True)])
def test_the_state_of_a_bank_that_only_monitors_read_is_not_logged(run, tmp_path, more, is_read):
    groups = ["data.neighbours.group=4", "data.neighbours.width=5"]
    code, result, _ = run("method=simclr", *groups, "logging.mined_rows=2", "trainer.max_steps=2", *more)
    assert (code, result["bank_used"]) == (0, False)
    logged = [name for name in metrics(tmp_path / "runs/tiny")[0] if name.startswith("bank/")]
    assert (logged == ["bank/refused"]) != is_read
    assert table(tmp_path / "runs/tiny/mined.csv")  # the hardest of the batch


def test_a_run_shorter_than_the_interval_still_says_how_it_ended(run, tmp_path):
    _, result, err = run("logging.every_n_steps=5", "schedule.epochs=2")
    rows = [row for row in metrics(tmp_path / "runs/tiny") if row["train/loss"]]
    assert [row["step"] for row in rows] == ["5", "8"]
    assert {"train/loss", "perf/images_per_s"} <= result["metrics"].keys()
    _, result, err = run("run.name=short", "logging.every_n_steps=1000", "trainer.max_steps=3")
    assert [row["step"] for row in metrics(tmp_path / "runs/short") if row["train/loss"]] == ["3"]
    assert "interval" not in err


@pytest.mark.parametrize("end", ["max_steps", "by itself", "divergence", "error"])
def test_decoding_processes_end_with_the_run(run, monkeypatch, end):
    """At once: a garbage collection that met their loader would wait for seconds."""
    before, streamed = {*multiprocessing.active_children()}, ["data.resident=false", "data.num_workers=1"]
    raised = {"divergence": Diverged("nan", 1), "error": ZeroDivisionError}.get(end)

    def fail(self, *_):
        raise raised

    if raised is not None:
        monkeypatch.setattr(Moco, "compare", fail)
    if end == "error":
        with pytest.raises(ZeroDivisionError):
            run(*streamed)
    else:
        code, _, _ = run(*streamed, f"trainer.max_steps={2 if end == 'max_steps' else 12}")
        assert code == (3 if raised else 0)
    assert {*multiprocessing.active_children()} == before


def test_the_training_path_has_no_labels(run, tmp_path, monkeypatch):
    """Whatever the label table says, the weights are the same."""
    run("run.name=plain")
    made = FileImages.__init__

    def shuffled(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.labels is not None:
            self.labels = self.labels[
                torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(3))
            ]

    monkeypatch.setattr(FileImages, "__init__", shuffled)
    run("run.name=shuffled")
    assert same(weights(tmp_path / "runs/plain"), weights(tmp_path / "runs/shuffled"))


def test_monitors_and_pictures_leave_the_weights_alone(run, tmp_path):
    run("run.name=with", *tiny.MONITORED, "logging.knn_every_epochs=1", "logging.probe_every_epochs=1")
    run("run.name=without", "logging.every_n_steps=7")
    assert same(weights(tmp_path / "runs/with"), weights(tmp_path / "runs/without"))
    scored = metrics(tmp_path / "runs/with")
    for name in ("knn/top1", "probe/top1"):  # the untrained encoder's first
        assert [row["step"] for row in scored if row[name]] == ["0", "4", "8", "12"]
    assert not {"knn/top1", "probe/top1"} & {*metrics(tmp_path / "runs/without")[0]}


def test_online_scores_agree_with_the_offline_protocols(run, tmp_path):
    """On the same rows, features of the written encoder: kNN to the last digit, the probe within 1 point."""
    digits = ["data.name=digits", "data.root=null", "data.global_batch=256", "schedule.warmup_epochs=0"]
    scored = ["logging.knn_every_epochs=1", "logging.probe_every_epochs=1"]
    code, result, _ = run(*digits, *scored, "schedule.epochs=1")
    assert code == 0
    data = load_saved(PretrainConfig, tmp_path / "runs/tiny/config.yaml").data
    images, (encoder, _) = (
        open_dataset(data).labelled,
        load_encoder(tmp_path / "runs/tiny/encoder.safetensors"),
    )
    parts = []
    for rows in monitor_split(images):
        features, _ = extract(
            encoder,
            SomeImages(images, rows),
            data,
            batch_size=100,
            num_workers=0,
            device=torch.device("cpu"),
        )
        parts.append(PartFeatures(features, images.labels[rows], rows))
    assert not set(parts[0].rows.tolist()) & set(parts[1].rows.tolist())
    offline, online = Features(*parts, tuple(images.classes)), result["metrics"]
    by_knn = knn.score(offline, knn.KnnEvaluation("x", knn=knn.KnnConfig(k=[20])))
    assert online["knn/top1"] == pytest.approx(by_knn.lines[0].value, abs=1e-9)
    by_probe = linear_probe.score(offline, linear_probe.LinearEvaluation("x"))
    assert online["probe/top1"] == pytest.approx(by_probe.lines[0].value, abs=0.01)


def test_accumulated_micro_batches_are_one_step(run, tmp_path, monkeypatch):
    """One write of the bank, one step of the learning rate and of the key network's momentum, by formula."""
    write, written = Miner.write, []

    def spied(self, keys, ids, step):
        written.append((step, sorted(ids.tolist())))
        write(self, keys, ids, step)

    monkeypatch.setattr(Miner, "write", spied)
    schedule = ["schedule.epochs=2", "encoder.momentum=0.5", "encoder.momentum_end=0.9"]
    code, result, _ = run(
        *schedule, "trainer.accumulate_grad_batches=2", "run.checkpoint_every=1", "run.keep_last=99"
    )
    total = result["steps"]
    assert (code, total) == (0, 8)
    assert [step for step, _ in written] == list(range(total))
    assert all(len(set(ids)) == 8 for _, ids in written)
    states = [
        torch.load(tmp_path / f"runs/tiny/checkpoints/step-{step}/trainer.pt", weights_only=True)
        for step in range(1, total + 1)
    ]
    for step in range(1, total):
        old, new = states[step - 1]["state_dict"], states[step]["state_dict"]
        momentum = 0.9 - (0.9 - 0.5) * (1 + math.cos(math.pi * step / total)) / 2
        for name in ("encoder.conv1.weight", "projector.3.bias"):
            expected = momentum * old[f"key_{name}"] + (1 - momentum) * new[name]
            torch.testing.assert_close(new[f"key_{name}"], expected)
        # Rate of the next step: 1 epoch of warm-up, 4 steps, of the peak of base_lr x 8 / 256.
        share = (step + 2) / 5 if step + 1 < 4 else (1 + math.cos(math.pi * (step + 1 - 4) / (total - 4))) / 2
        rate = states[step]["optimizer_states"][0]["param_groups"][0]["lr"]
        assert rate == pytest.approx(0.4 * 8 / 256 * share)


def test_a_profile_tells_the_parts_of_a_step_and_changes_none(run, tmp_path):
    code, result, err = run("run.name=profiled", "profile=true")
    shares = {name: value for name, value in result["metrics"].items() if name.startswith("perf/share_")}
    assert code == 0
    assert [name.removeprefix("perf/share_") for name in shares] == list(PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    for name in ("augmentation", "query", "key", "mining", "loss", "backward", "optimizer"):
        assert shares[f"perf/share_{name}"] > 0, name
    assert "profile of 2 steps" in err  # 10 of the 12 warm up
    run("run.name=plain")
    assert same(weights(tmp_path / "runs/plain"), weights(tmp_path / "runs/profiled"))
    assert (
        "10 steps and until the bank is filled to mining.min_fill; raise trainer"
        in run("run.name=short", "profile=true", "trainer.max_steps=2")[2]
    )


def test_a_collapse_is_named_and_a_good_run_is_not(run, monkeypatch, alerts):
    """The loss pulls all embeddings to one point."""
    _, _, err = run("run.name=good")
    assert "of the embeddings" not in err
    assert not alerts

    def pull(self, query, *_):
        return 1 - query[:, 0].mean(), {}

    monkeypatch.setattr(Moco, "compare", pull)
    code, result, err = run(
        "run.name=collapsed", "schedule.epochs=20", "optimizer.base_lr=9", "encoder.momentum=0"
    )
    assert code == 0
    *_, last, after = err.strip().splitlines()
    assert after.startswith("next: contrastive-eval worth checkpoint=")
    assert re.match(
        r"at the end of the run: (complete|dimensional) collapse of the embeddings after epoch 20", last
    )
    rank = float(re.search(r"effective rank (\S+) of 8", last)[1])
    assert rank == pytest.approx(result["metrics"]["stats/rankme"], abs=0.05)
    assert rank < 2 or result["metrics"]["stats/std"] < 0.1
    ((title, text),) = alerts  # once, not every epoch
    assert (title, "collapse of the embeddings" in text) == ("collapse", True)
    assert [f"at the end of the run: {text}" for text in result["warnings"]] == [last]


@pytest.mark.parametrize("taken", [0, 36], ids=["nothing to fit on", "nothing to score"])
def test_too_few_images_for_online_scores_do_not_stop_the_run(run, monkeypatch, taken):
    parts = torch.arange(taken), torch.arange(taken, 36)
    monkeypatch.setattr("contrastive.callbacks.online.monitor_split", lambda images: parts)
    code, result, err = run("logging.knn_every_epochs=1", "logging.probe_every_epochs=1")
    assert code == 0, err
    assert err.count("no online scores: of ") == 1
    assert not {"knn/top1", "probe/top1"} & set(result["metrics"])


def test_the_row_of_a_step_has_the_learning_rate_and_the_momentum_that_it_used(run, tmp_path):
    parts = ("trainer.max_steps=5", "trainer.max_steps=12")  # the first row after a resume too
    for part in parts:
        _, result, _ = run("optimizer.base_lr=0.32", "encoder.momentum_end=1", part)
    rows = metrics(tmp_path / "runs/tiny")
    rates = [0.01 * learning_rate(step, total_steps=12, warmup_steps=4) for step in range(12)]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx(rates, rel=1e-12)
    assert [float(row["train/momentum"]) for row in rows] == [
        momentum_at(s, 12, 0.99, 1.0) for s in range(12)
    ]
    assert result["metrics"]["train/lr"] == pytest.approx(rates[-1], rel=1e-12)


def test_logged_and_documented_metrics_are_the_same(run, tmp_path):
    run("run.name=base", *tiny.MONITORED, "profile=true", "logging.probe_every_epochs=20")
    index = ("mining.backend=faiss", "mining.index=IVF1,Flat", "mining.recall_every=1", "mining.min_fill=0.9")
    for name, more in {
        "nnclr": ("method=nnclr", "trainer.max_steps=4"),
        "supcon": ("objective.name=supcon", "trainer.max_steps=4"),
        "index": ("data.name=images", *index, "trainer.max_steps=8"),
    }.items():
        assert run(f"run.name={name}", *more)[0] == 0
    logged = {column for each in (tmp_path / "runs").iterdir() for column in metrics(each)[0]}
    logged -= {"step", "epoch", "seconds"}
    assert {name for name in logged if describe(name) is None} == set()
    by_evaluations = {"probe/*", "knn/*", "stats/*", "stats/attention_*"}
    by_accelerators = {"system/device_memory_mib"}
    patterns = METRICS.keys() - by_evaluations - by_accelerators
    assert {pattern for pattern in patterns if not fnmatch.filter(logged, pattern)} == set()

"""The command line end to end, in this process, on small images made here."""

import csv
import fnmatch
import itertools
import json
import math
import re
import signal
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive import dry_run, fitting, optim, pretrain, trainer_settings
from contrastive.__main__ import main
from contrastive.callbacks import preemption, watch_health
from contrastive.callbacks.online import monitor_split
from contrastive.callbacks.profile import PARTS
from contrastive.callbacks.watch_mining import WatchMining
from contrastive.checkpoint.manifest import verify
from contrastive.config import PretrainConfig
from contrastive.config_files import load_saved
from contrastive.data.batch import Batch
from contrastive.data.dataset import open_dataset
from contrastive.data.images import FileImages, SomeImages
from contrastive.encoders.weights import load_encoder
from contrastive.logging.metrics_csv import MetricsCsv
from contrastive.logging.names import METRICS, describe
from contrastive.methods.moco import Moco
from contrastive.module import ContrastiveModule
from contrastive.momentum import momentum_at
from contrastive.optim import learning_rate
from eval import knn, linear_probe
from eval.features import Features, Split, extract
from eval.frozen import resolve
from memory_bank.lookahead import LookAhead
from memory_bank.miner import Miner
from memory_bank.sealed import read
from memory_bank.state import load_state


@pytest.fixture
def folder(tmp_path):
    """48 images in three classes, told apart by colour."""
    colours = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    noise = np.random.default_rng(0)
    for name, colour in colours.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.clip(np.array(colour) + noise.integers(-40, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Call the command with a tiny recipe; returns exit code, the JSON of the last line, stderr."""

    def call(*overrides):
        code = main(
            [
                "data.name=imagefolder",
                f"data.root={folder}",
                "data.image_size=16",
                "data.global_batch=8",
                "encoder.width=8",
                "encoder.projector_hidden=16",
                "encoder.projector_dim=8",
                "mining.num_hard=4",
                "mining.num_uniform=4",
                "mining.min_fill=0.2",
                "schedule.epochs=3",
                "schedule.warmup_epochs=1",
                "logging.every_n_steps=1",
                "logging.progress=false",
                "logging.wandb.mode=disabled",
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


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read(run_dir / "encoder.safetensors")[0]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def bank(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoints = run_dir / "checkpoints"
    saved = load_state(checkpoints / (checkpoints / "last").read_text().strip() / "bank.safetensors")
    return {name: value for name, value in saved["bank"].items() if isinstance(value, torch.Tensor)}


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def metrics(run_dir: Path) -> list[dict[str, str]]:
    return table(run_dir / "metrics.csv")


def test_a_run_leaves_the_directory_that_the_readme_describes(run, tmp_path):
    code, result, err = run()
    run_dir = tmp_path / "runs" / "tiny"
    assert code == 0
    assert result["finished"]
    assert err.count("dataset bank of 38 x 8; exact search") == 1
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


def test_a_run_shorter_than_the_interval_still_says_how_it_ended(run, tmp_path):
    _, result, err = run("logging.every_n_steps=5", "schedule.epochs=2")
    rows = [row for row in metrics(tmp_path / "runs/tiny") if row["train/loss"]]
    assert [row["step"] for row in rows] == ["5", "8"]
    assert {"train/loss", "perf/images_per_s"} <= result["metrics"].keys()
    _, result, err = run("run.name=short", "logging.every_n_steps=1000", "trainer.max_steps=3")
    assert [row["step"] for row in metrics(tmp_path / "runs/short") if row["train/loss"]] == ["3"]
    assert "interval" not in err


def test_a_run_without_negatives_says_which_filter_drops_them_and_stops(run):
    code, result, err = run("mining.relative_margin=50")
    assert code == 3
    assert not result["finished"]
    assert (
        err.count("has a negative: nothing is learnt. Of the bank's rows mining.relative_margin drops 100")
        == 1
    )
    assert "stopped: no query had a negative for 6 optimizer steps" in err


def test_a_finished_run_is_not_repeated(run, tmp_path):
    _, first, _ = run()
    before = (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns
    code, second, _ = run()
    assert (code, second) == (0, first)
    assert (tmp_path / "runs/tiny/encoder.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(run, tmp_path):
    run("run.name=whole")
    whole = tmp_path / "runs" / "whole"
    run("run.name=parts", "trainer.max_steps=5", "run.checkpoint_every=2")
    parts = tmp_path / "runs" / "parts"
    code, _, _ = run("run.name=parts", "run.checkpoint_every=2")
    assert code == 0
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))
    losses = [{row["step"]: row["train/loss"] for row in metrics(path)} for path in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(metrics(parts)) == 12  # none twice


def test_a_resumed_run_does_not_read_the_starting_weights(run, tmp_path):
    file = tmp_path / "start.safetensors"
    run("run.name=first", "trainer.max_steps=1")
    (tmp_path / "runs/first/encoder.safetensors").rename(file)
    given = [f"encoder.weights={file}", "run.checkpoint_every=2"]
    assert run("run.name=whole", *given, "trainer.max_steps=6")[0] == 0
    assert run(*given, "trainer.max_steps=4")[0] == 0
    file.unlink()
    code, _, err = run(*given, "--dry-run")
    assert (code, "cannot be read" in err) == (2, True)  # a dry run starts from the file
    code, result, _ = run(*given, "trainer.max_steps=6")
    assert (code, result["steps"]) == (0, 6)
    assert same(weights(tmp_path / "runs/tiny"), weights(tmp_path / "runs/whole"))


def test_a_band_that_is_widened_is_said_at_the_start(run):
    _, _, err = run("mining.band=[0.5,0.51]", "mining.num_hard=20", "trainer.max_steps=1")
    (line,) = [line for line in err.splitlines() if "mining.band" in line]
    assert "mining.num_hard=20 widens it" in line


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MetricsCsv, "state_dict", lambda self: {"seconds": 1000.0})  # spent by a first part
        run("trainer.max_steps=11", "run.checkpoint_every=1")
    _, result, _ = run()
    assert result["steps"] == 12
    assert 1000 < result["metrics"]["seconds"] <= result["seconds"] + 0.05 < 1100


def test_a_kill_between_the_last_save_and_its_pointer_is_mended(run, tmp_path):
    run()
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    newest = (checkpoints / "last").read_text()
    older = next(path.name for path in checkpoints.glob("step-*") if path.name != newest.strip())
    (checkpoints / "last").write_text(older + "\n")
    (tmp_path / "runs/tiny/summary.json").unlink()
    code, _, _ = run()
    assert code == 0
    assert (checkpoints / "last").read_text() == newest


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
    run("run.name=with", "logging.knn_every_epochs=1", "logging.probe_every_epochs=1")
    silent = ["logging.knn_every_epochs=0", "logging.probe_every_epochs=0", "logging.mined_rows=0"]
    run("run.name=without", *silent, "logging.every_n_steps=7")
    assert same(weights(tmp_path / "runs/with"), weights(tmp_path / "runs/without"))
    scored = metrics(tmp_path / "runs/with")
    assert sum(bool(row["knn/top1"]) for row in scored) == sum(bool(row["probe/top1"]) for row in scored) == 3
    assert not {"knn/top1", "probe/top1"} & {*metrics(tmp_path / "runs/without")[0]}


def test_online_scores_agree_with_the_offline_protocols(run, tmp_path):
    """On the same rows, features of the written encoder: kNN to the last digit, the probe within 1 point."""
    digits = ["data.name=digits", "data.root=null", "data.global_batch=64", "schedule.epochs=2"]
    code, result, _ = run(*digits, "encoder.name=resnet10", "logging.probe_every_epochs=2")
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
        parts.append(Split(features, images.labels[rows], rows))
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
        # What the next step will use: 1 epoch of warm-up, 4 steps, of the peak of base_lr x 8 / 256.
        share = (step + 2) / 5 if step + 1 < 4 else (1 + math.cos(math.pi * (step + 1 - 4) / (total - 4))) / 2
        rate = states[step]["optimizer_states"][0]["param_groups"][0]["lr"]
        assert rate == pytest.approx(0.4 * 8 / 256 * share)


def test_looking_ahead_on_a_thread_changes_no_bit_of_a_run(run, tmp_path):
    """Symmetric loss and accumulation included; the overlapped run is stopped and resumed as well."""
    settings = ["mining.query=stored", "mining.lag=2", "objective.symmetric=true"]
    settings += ["trainer.accumulate_grad_batches=2"]
    run("run.name=plain", *settings)
    overlapped = ["run.name=overlapped", "mining.overlap=true", *settings]
    run(*overlapped, "trainer.max_steps=5", "run.checkpoint_every=5")
    assert run(*overlapped)[0] == 0
    plain, overlapped = tmp_path / "runs/plain", tmp_path / "runs/overlapped"
    assert same(weights(plain), weights(overlapped))
    assert same(bank(plain), bank(overlapped))
    assert any(float(row["mining/similarity_mean"] or "nan") < 1 for row in metrics(plain))


def test_a_look_up_that_fails_on_its_thread_stops_the_run_with_its_own_traceback(run, monkeypatch):
    issue, on_threads = LookAhead.issue, set()

    def broken_issue(self, step):
        on_threads.add(threading.current_thread().name)
        if step == 7:
            raise ZeroDivisionError("the index broke")
        issue(self, step)

    monkeypatch.setattr(LookAhead, "issue", broken_issue)
    with pytest.raises(ZeroDivisionError, match="the index broke") as caught:
        run("mining.query=stored", "mining.overlap=true")
    assert "broken_issue" in "".join(traceback.format_exception(caught.value))
    assert on_threads == {"look-ahead"}
    assert "look-ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def alerts(monkeypatch):
    """Title and text of what W&B would tell people."""
    sent = []
    for module in (fitting, watch_health):
        monkeypatch.setattr(module, "alert", lambda trainer, title, text: sent.append((title, text)))
    return sent


def test_a_loss_that_is_not_finite_is_skipped_and_three_in_a_row_stop_the_run(
    run, tmp_path, monkeypatch, alerts
):
    poisoned = {3}
    alter_queries(monkeypatch, lambda query, step: query * float("nan") if step in poisoned else query)
    code, result, _ = run("run.name=once", "run.checkpoint_every=4", "run.keep_last=9")
    assert (code, result["metrics"]["train/skipped_steps"], alerts) == (0, 1.0, [])
    # The save due after the skipped step waited for a loss that was finite.
    assert saved(tmp_path / "runs/once") == ["step-12", "step-5", "step-8"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "runs/once").values())
    poisoned |= {6, 7, 8}
    code, result, err = run("run.name=diverged", "run.checkpoint_every=2")
    assert code == 3
    assert "optimizer.base_lr" in err
    ((title, text),) = alerts
    assert (title, "not finite" in text) == ("divergence", True)
    assert not (tmp_path / "runs/diverged/summary.json").exists()
    # Three times, what step-6 held gave no loss; step-5 is the one that waited.
    assert saved(tmp_path / "runs/diverged") == ["step-5"]


def alter_queries(monkeypatch, alter):
    """Let ``alter(query, step)`` take the place of the query that enters the loss."""
    compare = Moco.compare

    def altered(self, query, key, negatives, rows, step):
        return compare(self, alter(query, step), key, negatives, rows, step)

    monkeypatch.setattr(Moco, "compare", altered)


@pytest.fixture
def moves(monkeypatch):
    """Of each step, whether weights or statistics moved; then, and only then, must the bank be written."""
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


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16-mixed", "16-mixed"])
def test_mixed_precision_clips_and_skips_where_optimizers_can_be_fused(
    run, monkeypatch, moves, scale_loss, scaled
):
    """The loss of step 1 is NaN."""

    def altered(query, step):
        if step == 2 and scaled:  # more than the scale allows for
            query.register_hook(lambda gradient: gradient * float("inf"))
        return query * float("nan") if step == 1 else query

    scale_loss(torch.amp.GradScaler("cpu") if scaled else None)
    monkeypatch.setattr(optim, "_on_cuda", lambda groups: True)
    alter_queries(monkeypatch, altered)
    few = ["schedule.epochs=1", "logging.knn_every_epochs=0", "logging.probe_every_epochs=0"]
    code, result, _ = run("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", *few)
    assert (code, moves) == (0, [True, False, not scaled, True])
    assert result["metrics"]["train/skipped_steps"] == 1 + scaled


def test_gradients_that_overflow_at_every_loss_scale_stop_the_run(run, tmp_path, monkeypatch, scale_loss):
    """From step 2 on; the third brings the scale below 1. Saves wait meanwhile, or good ones would go."""

    def overflowing(query, step):
        if step >= 2:
            query.register_hook(lambda gradient: gradient * float("inf"))
        return query

    alter_queries(monkeypatch, overflowing)
    scale_loss(torch.amp.GradScaler("cpu", init_scale=4.0))
    code, result, err = run("trainer.precision=bf16-mixed", "run.checkpoint_every=1")
    assert (code, result["steps"]) == (3, 4)
    assert "float16 at a loss scale of 0.5, the last at step 4. Set trainer.precision=bf16-mixed" in err
    assert "step-1 is the last good checkpoint" in err
    assert saved(tmp_path / "runs/tiny") == ["step-1"]


def test_a_step_of_fewer_than_two_images_moves_nothing_and_stops_nothing(run, monkeypatch, moves):
    """However many in a row; momentum and weight decay have no part in them."""
    step = ContrastiveModule.training_step

    def halved(self, batch, batch_idx):
        kept = slice(1) if 1 <= self.global_step <= 4 else slice(None)
        return step(self, Batch(batch.images[kept], batch.ids[kept]), batch_idx)

    monkeypatch.setattr(ContrastiveModule, "training_step", halved)
    few = ["schedule.epochs=2", "logging.knn_every_epochs=0", "logging.probe_every_epochs=0"]
    code, result, err = run("data.max_corrupt=0.99", *few)
    assert (code, moves) == (0, [True, *[False] * 4, True, True, True])
    assert result["metrics"]["train/skipped_steps"] == 4
    assert err.count("fewer than 2 of its images of step 1 (corrupt.csv") == 1


@pytest.mark.parametrize(
    ("ruined_by", "what"),
    [(5, "conv1.weight"), (12, "conv1.weight"), (12, "bn1.running_var")],
    ids=["in the middle", "by the last step", "in what evaluation alone reads"],
)
def test_a_diverged_run_keeps_its_last_good_checkpoint(run, tmp_path, monkeypatch, ruined_by, what):
    update = ContrastiveModule.optimizer_step

    def ruin(self, *args, **kwargs):
        step = self.global_step + 1
        update(self, *args, **kwargs)
        if step == ruined_by:
            self.encoder.state_dict()[what].fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "optimizer_step", ruin)
        code, result, err = run("run.checkpoint_every=1", "run.keep_last=1")
    run_dir, good = tmp_path / "runs/tiny", f"step-{ruined_by - 1}"
    assert (code, result["finished"]) == (3, False)
    assert f"{run_dir / 'checkpoints' / good} is the last good checkpoint" in err
    assert saved(run_dir) == [good]
    assert (run_dir / "checkpoints/last").read_text() == f"{good}\n"
    assert verify(run_dir / "checkpoints" / good) == ruined_by - 1
    encoder, _ = load_encoder(Path(result["encoder"]))
    assert encoder(torch.rand(2, 3, 16, 16)).isfinite().all()
    assert resolve(str(run_dir)).encoder == Path(result["encoder"])
    code, result, _ = run("run.checkpoint_every=1")  # with the cause gone it goes on from there
    assert (code, result["steps"]) == (0, 12)
    assert [int(float(row["step"])) for row in metrics(run_dir) if row["train/loss"]] == list(range(1, 13))


def test_a_learning_rate_beyond_reason_ends_with_3(run, tmp_path):
    code, result, err = run("optimizer.base_lr=1e38", "run.checkpoint_every=1")
    assert (code, result["encoder"]) == (3, None)
    for part in ("not finite", "optimizer.base_lr", "No checkpoint was good"):
        assert part in err
    assert saved(tmp_path / "runs/tiny") == []
    assert run("--dry-run", "optimizer.base_lr=1e38")[0] == 3


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
    assert "before the bank was filled" in run("run.name=short", "profile=true", "trainer.max_steps=2")[2]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.devces=1"], ["trainer.devces", "did you mean 'devices'"]),
        (["trainer.logger=true"], ["trainer.logger", "logging.*"]),
        (["profile=true", "trainer.profiler=simple"], ["profile=true", "trainer.profiler"]),
        (["trainer.max_epochs=3"], ["trainer.max_epochs", "schedule.epochs"]),
        (["data.root=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["data.global_batch=4096"], ["4096", "data.global_batch"]),
        (["data.global_batch=9", "trainer.accumulate_grad_batches=2"], ["9", "2", "10"]),
        (["trainer.accelerator=gpu", "trainer.devices=4"], ["trainer", "gpu"]),
        (["trainer.num_nodes=2"], ["trainer.num_nodes=2", "slurm.sbatch", "torchrun"]),
        (["trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp_spawn", "allowed are auto, ddp,"]),
        (["trainer.detect_anomaly=maybe"], ["trainer.detect_anomaly=maybe", "False, True"]),
        (["trainer.deterministic=abc"], ["trainer.deterministic=abc", "warn"]),
        (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "0 or more"]),
        (["trainer.min_steps=abc"], ["trainer.min_steps='abc'", "1 or more"]),
        (["trainer.sync_batchnorm=true"], ["trainer.sync_batchnorm", "encoder.batch_norm=sync"]),
        (["encoder.batch_norm=shuffle"], ["one device", "encoder.batch_norm=split"]),
        (["encoder.batch_norm=sync", "trainer.devices=2"], ["2 processes on the CPU", "shuffle"]),
        (["encoder.batch_norm=split"], ["global_batch=8", "8 groups", "use 16 or more"]),
        (["data.global_batch=2", "trainer.accumulate_grad_batches=2"], ["2 images", "use 4 or more"]),
        (["encoder.weights=missing.pth"], ["missing.pth"]),
        (["encoder.weights=~nosuchuser/w.pth"], ["encoder.weights=~nosuchuser/w.pth", "home folder"]),
        (
            ["data.name=images", "objective.name=supcon"],
            ["data.name=images has no labels; use data.name=imagefolder"],
        ),
        (["data.name=imagefoldr"], ["imagefoldr", "imagefolder"]),
        (["run.root=/proc/version/runs"], ["/proc/version", "run.root"]),
    ],
)
def test_wrong_input_exits_2_with_the_remedy_and_writes_nothing(run, tmp_path, overrides, parts):
    code, _, err = run(*overrides)
    assert code == 2, err
    for part in parts:
        assert part in err, err
    assert not (tmp_path / "runs").exists()


def test_folders_without_a_readable_image_are_refused_before_anything_is_written(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(f"data.root={tmp_path / 'empty'}", "data.name=images")
    assert code == 2
    assert str(tmp_path / "empty") in err
    (tmp_path / "broken").mkdir()
    for number in range(20):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no jpeg")
    code, _, err = run(f"data.root={tmp_path / 'broken'}", "data.name=images")
    assert code == 2
    for part in ("none of the 20 images can be read", "0.jpg", "data.root"):
        assert part in err
    assert not (tmp_path / "runs").exists()


def test_a_second_process_is_refused_by_name(run, tmp_path):
    import subprocess
    import sys

    run_dir = tmp_path / "runs" / "tiny"
    code = (
        "import sys, time; from pathlib import Path; from contrastive.run_dir import hold\n"
        "lock = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(120)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        code, _, err = run()
        holder.kill()
    assert code == 2
    for part in (f"process {holder.pid}", "run.name"):
        assert part in err
    assert not (run_dir / "config.yaml").exists()
    assert run()[0] == 0  # a killed holder's lock is gone with it


@pytest.mark.parametrize(
    "override",
    [
        "mining.index=garbage",
        "bank.device=accelerator",
        "bank.kind=queue",
        f"data.num_workers={'1' * 400}",
        "bank.max_age=99999999999999999999999",
        "optimizer.base_lr=1e300",
        "mining.false_negative_threshold=nan",
        "trainer.precision=bf16-true",
        "trainer.accumulate_grad_batches=0",
        "trainer.max_steps=abc",
        "trainer.max_time=5",
        "data.std=[0,1,1]",
        "objective.temperature=inf",
        "data.root=[",
        "data.mean.0=0.5",
    ],
)
def test_settings_that_fail_late_are_refused_early(run, tmp_path, override):
    code, _, err = run("mining.backend=faiss", override)
    assert code == 2, err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_networks_that_do_not_fit_into_memory_are_refused(run, tmp_path, monkeypatch):
    from contrastive import parts

    def build(config, image_size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(parts, "build_encoder", build)
    code, _, err = run()
    assert code == 2
    assert "can't allocate memory); lower encoder.width" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_steps_that_do_not_fit_into_memory_are_refused(run, monkeypatch, flags, error):
    fail(monkeypatch, error)
    code, _, err = run(*flags)
    assert code == 2
    said = err.splitlines()[-1]
    assert said.startswith(f"error: training does not fit into memory ({str(error).partition(chr(10))[0]}")
    assert "raise trainer.accumulate_grad_batches" in said


def test_another_error_of_a_step_is_a_fault_of_the_program(run, monkeypatch):
    fail(monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run()


def fail(monkeypatch, error):
    """Let every step raise ``error``."""

    def step(self, batch, batch_idx):
        raise error

    monkeypatch.setattr(ContrastiveModule, "training_step", step)


def test_a_bank_that_does_not_fit_into_memory_is_refused(run, tmp_path):
    code, _, err = run("bank.kind=queue", "bank.capacity=2147483647", "encoder.projector_dim=65536")
    assert code == 2
    assert err.splitlines()[-1].endswith("; lower bank.capacity or encoder.projector_dim")
    assert not (tmp_path / "runs").exists()


def test_damaged_files_of_a_run_are_named_or_done_without(run, tmp_path):
    run("trainer.max_steps=4", "run.checkpoint_every=2")
    run_dir = tmp_path / "runs" / "tiny"
    (run_dir / "summary.json").write_text('{"steps": ')
    assert run("trainer.max_steps=4", "run.checkpoint_every=2")[0] == 0
    manifest = (run_dir / "manifest.csv").read_bytes()
    (run_dir / "manifest.csv").unlink()
    code, _, err = run("run.checkpoint_every=2")
    assert code == 2
    assert "manifest.csv is missing" in err
    (run_dir / "manifest.csv").write_bytes(manifest)
    for file in (run_dir / "checkpoints").glob("step-*/trainer.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint skipped"):
        code, _, err = run("run.checkpoint_every=2")
    assert code == 2
    assert "none of its checkpoints can be read" in err


def test_too_many_unreadable_files_stop_the_run(run, folder, tmp_path):
    for number in range(8):
        (folder / "red" / f"broken-{number}.png").write_bytes(b"no image")
    code, result, err = run("data.max_corrupt=0.01")
    assert code == 3
    assert not result["finished"]
    assert "data.max_corrupt" in err
    listed = table(tmp_path / "runs/tiny/corrupt.csv")
    assert {Path(row["key"]).name for row in listed} <= {f"broken-{number}.png" for number in range(8)}
    assert listed
    code, result, _ = run("data.max_corrupt=0.5")
    assert (code, result["finished"]) == (0, True)


def test_unreadable_files_are_listed_anew_where_the_data_changed(run, folder, tmp_path):
    listed = tmp_path / "runs/tiny/corrupt.csv"
    for number in range(3):
        (folder / "red" / f"broken-{number}.png").write_bytes(b"no image")
    assert run("data.max_corrupt=0.01")[0] == 3
    (folder / "red" / "broken-0.png").unlink()
    assert run("data.max_corrupt=0.5", "trainer.max_steps=2", "run.checkpoint_every=1")[0] == 0
    if listed.exists():  # two steps do not meet every file
        assert {Path(row["key"]).name for row in table(listed)} <= {"broken-1.png", "broken-2.png"}
    (folder / "red" / "broken-1.png").unlink()
    (folder / "red" / "a.png").write_bytes(b"no image")
    assert run("data.max_corrupt=0.5", "data.allow_changed=true")[0] == 0
    assert {Path(row["key"]).name for row in table(listed)} == {"a.png", "broken-2.png"}


def test_another_runs_directory_names_the_fields_that_differ(run):
    run()
    code, _, err = run("optimizer.base_lr=0.5", "objective.temperature=0.3")
    assert code == 2
    for part in ("optimizer.base_lr was", "is 0.5", "objective.temperature", "run.name"):
        assert part in err


def test_changed_data_behind_a_run_names_the_files(run, folder, tmp_path):
    run("trainer.max_steps=2", "run.checkpoint_every=1")
    victim = sorted((folder / "red").iterdir())[0]
    victim.write_bytes(victim.read_bytes() + b"more")
    code, _, err = run("run.checkpoint_every=1")
    assert code == 2
    assert victim.name in err
    assert "data.allow_changed=true" in err
    assert run("run.checkpoint_every=1", "data.allow_changed=true")[0] == 0


@pytest.mark.parametrize("kind", ["dataset", "queue"])
def test_files_added_or_removed_are_gone_on_with_without_the_old_bank(run, folder, tmp_path, kind):
    """From then on they are the run's: it resumes without the flag."""
    bank = ["bank.kind=queue", "bank.capacity=20"] if kind == "queue" else []
    every = ["run.checkpoint_every=1", *bank]
    run("trainer.max_steps=4", *every)
    sorted((folder / "red").iterdir())[0].unlink()
    for number in range(6):
        Image.new("RGB", (20, 20), (number * 40, 90, 0)).save(folder / "blue" / f"more-{number}.png")
    code, _, err = run(*every)
    assert code == 2
    assert "added" in err
    code, _, err = run("trainer.max_steps=6", "data.allow_changed=true", *every)
    assert code == 0
    assert "starts empty" in err
    code, result, err = run(*every)
    assert code == 0
    assert result["finished"]
    assert "starts empty" not in err
    for path in sorted((folder / "green").iterdir())[:-2]:
        path.unlink()
    (tmp_path / "runs/tiny/summary.json").unlink()
    code, _, err = run("data.allow_changed=true", *every)
    assert code == 2
    assert "restore the images" in err


@pytest.mark.parametrize(
    "override", ["mining.index=garbage", "bank.device=accelerator", "run.root=/dev/null"]
)
def test_a_dry_run_refuses_what_a_run_would(run, override):
    code, _, err = run("--dry-run", "mining.backend=faiss", override)
    assert code == 2
    assert override.partition("=")[0] in err


def test_a_dry_run_estimates_and_keeps_nothing(run, tmp_path):
    code, result, _ = run("--dry-run")
    assert code == 0
    assert result["steps"] > 2
    assert result["estimated_seconds"] >= 0
    assert not (tmp_path / "runs").exists()
    assert main(["--dry-rn"]) == 2


@pytest.mark.parametrize(("most_s", "taken"), [(1000.0, 4), (20.0, 2)])
def test_a_dry_run_estimates_from_the_steps_after_the_first_in_bounded_time(run, monkeypatch, most_s, taken):
    clock = iter([0.0, 50.0, 50.5, 51.0, 60.0])  # of the start and of the end of each step
    monkeypatch.setattr("contrastive.pretrain.STEPS", 4)
    monkeypatch.setattr("contrastive.pretrain.SECONDS", most_s)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    code, result, err = run("--dry-run")
    assert code == 0
    assert result["estimated_seconds"] == 12 * 0.5
    slow = 12 * 4.75 if taken == 4 else 12 * 0.5  # third quartile of 0.5, 0.5 and 9 s
    assert result["estimated_seconds_range"] == [12 * 0.5, slow]
    assert re.findall(r"^step (\d+): (\S+) s$", err, re.MULTILINE)[:2] == [("1", "50.00"), ("2", "0.50")]
    assert f"12 steps take about 0:00:06, 0:00:06 to 0:00:{slow:02.0f} (h:min:s)" in err
    assert f"median and quartiles of {taken - 1} steps" in err


@pytest.fixture
def trained(monkeypatch):
    """Precision of each run that started, on a processor with bfloat16 instructions or without."""
    found, fit = [], pretrain.fit

    def noted(trainer, *others):
        found.append(trainer.precision)
        return fit(trainer, *others)

    monkeypatch.setattr(pretrain, "fit", noted)

    def on(bf16):
        monkeypatch.setattr(trainer_settings, "_cpu_has_bf16", lambda: bf16)
        return found

    return on


EMULATED = "trainer.precision=bf16-mixed takes about ten times as long as 32-true on this processor"


@pytest.fixture
def mixed_recipe(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text("defaults: [digits]\ntrainer: {precision: bf16-mixed}\n")
    return ["--config", str(path), "schedule.epochs=1", "schedule.warmup_epochs=0"]


@pytest.mark.parametrize(("bf16", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_recipe_in_bfloat16_runs_in_float32_where_the_processor_lacks_it(
    run, tmp_path, trained, mixed_recipe, bf16, used
):
    precisions = trained(bf16)
    code, _, err = run(*mixed_recipe)
    assert (code, precisions) == (0, [used])
    assert err.count(f"{EMULATED}, which has no bfloat16 instructions; 32-true is used") == (not bf16)
    saved_config = load_saved(PretrainConfig, tmp_path / "runs/tiny/config.yaml")
    assert saved_config.trainer["precision"] == "bf16-mixed"  # what was asked for


def test_a_run_that_fell_back_to_float32_resumes_where_the_processor_has_bfloat16(run, trained, mixed_recipe):
    halves = [*mixed_recipe, "run.checkpoint_every=1"]
    trained(bf16=False)
    assert run(*halves, "trainer.max_steps=3")[1]["steps"] == 3
    precisions = trained(bf16=True)
    code, result, _ = run(*halves)
    assert (code, result["finished"], precisions) == (0, True, ["32-true", "bf16-mixed"])


@pytest.mark.parametrize("override", ["trainer.precision=bf16-mixed", "--trainer.precision=bf16-mixed"])
def test_bfloat16_on_the_command_line_is_kept_with_a_warning(run, trained, override):
    precisions = trained(bf16=False)
    code, _, err = run(override, "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert (code, precisions) == (0, ["bf16-mixed"])
    assert err.count(f"{EMULATED}, which has no bfloat16 instructions; set trainer.precision=32-true") == 1


def test_a_dry_run_falls_back_to_float32_too(run, trained, mixed_recipe):
    trained(bf16=False)
    _, _, err = run(*mixed_recipe, "--dry-run")
    assert err.count("32-true is used") == 1
    assert err.index("32-true is used") < err.index("step 1")


def test_a_collapse_is_named_and_a_good_run_is_not(run, monkeypatch, alerts):
    """An alignment-only loss has nothing to push away from."""
    _, _, err = run("run.name=good")
    assert "collapse" not in err
    assert not alerts

    def alignment(self, query, key, *_):
        return (query - key).square().sum(1).mean(), {}

    monkeypatch.setattr(Moco, "compare", alignment)
    code, result, err = run(
        "run.name=collapsed", "schedule.epochs=30", "optimizer.base_lr=3", "encoder.momentum=0"
    )
    assert code == 0
    last = err.strip().splitlines()[-1]
    assert re.match(
        r"the run ended with a (complete|dimensional) collapse of the embeddings after epoch 30", last
    )
    rank = float(re.search(r"effective rank (\S+) of 8", last)[1])
    assert rank == pytest.approx(result["metrics"]["stats/rankme"], abs=0.05)
    assert rank < 2 or result["metrics"]["stats/std"] < 0.1
    ((title, text),) = alerts  # once, not every epoch
    assert (title, "collapse of the embeddings" in text) == ("collapse", True)


@pytest.mark.parametrize(
    "when", ["pretrain.open_dataset", "parts.build_loader"]
)  # outside of Lightning's fit, and within
def test_a_signal_ends_a_dry_run_without_a_promise(run, tmp_path, monkeypatch, when):
    asked = []
    monkeypatch.setattr("contrastive.__main__.requeue", lambda: asked.append("requeue"))
    monkeypatch.setattr(f"contrastive.{when}", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
    code, _, err = run("--dry-run")
    assert (code, err.splitlines()[-1]) == (75, "stopped by SIGUSR1; nothing is kept")
    assert (asked, (tmp_path / "runs").exists()) == ([], False)


@pytest.mark.parametrize(
    "when", ["pretrain.open_dataset", "parts.build_loader"]
)  # outside of Lightning's fit, and within
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_before_the_first_step_ends_the_start_in_order(run, monkeypatch, when, name):
    asked, before = [], signal.getsignal(signal.Signals[name])
    with monkeypatch.context() as patch:
        patch.setattr("contrastive.__main__.requeue", lambda: asked.append("requeue"))
        patch.setattr(f"contrastive.{when}", lambda *_, **__: signal.raise_signal(signal.Signals[name]))
        code, _, err = run()
    assert code == 75
    goes_on = "the same command goes on from the last checkpoint, or starts anew where there is none"
    assert err.splitlines()[-1] == f"stopped by {name}; {goes_on}"
    assert asked == (["requeue"] if name == "SIGUSR1" else [])
    assert signal.getsignal(signal.Signals[name]) == before
    assert run("trainer.max_steps=1")[0] == 0


def test_a_second_ctrl_c_does_not_wait_for_the_step(run, monkeypatch):
    def impatient(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(ContrastiveModule, "training_step", impatient)
    code, _, err = run()
    assert (code, err.splitlines()[-1][:17]) == (75, "stopped by SIGINT")


@pytest.mark.parametrize("taken", [0, 36], ids=["nothing to fit on", "nothing to score"])
def test_too_few_images_for_online_scores_do_not_stop_the_run(run, monkeypatch, taken):
    parts = torch.arange(taken), torch.arange(taken, 36)
    monkeypatch.setattr("contrastive.callbacks.online.monitor_split", lambda images: parts)
    code, result, err = run("logging.knn_every_epochs=1", "logging.probe_every_epochs=1")
    assert code == 0, err
    assert err.count("no online scores: of ") == 1
    assert not {"knn/top1", "probe/top1"} & set(result["metrics"])


def test_a_preempted_run_spends_no_time_on_scores(run, monkeypatch):
    step = ContrastiveModule.training_step

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(ContrastiveModule, "training_step", interrupted)
    code, result, _ = run("logging.knn_every_epochs=1")
    assert (code, result["steps"]) == (75, 1)
    assert not {"knn/top1", "probe/top1"} & set(result["metrics"])


def test_odd_entries_of_a_run_are_refused_by_name_before_a_step_is_taken(run, tmp_path):
    run("trainer.max_steps=2")
    run_dir = tmp_path / "runs" / "tiny"
    for name in (
        "metrics.csv",
        "encoder.safetensors",
        "mined.csv",
        "bank.png",
        "corrupt.csv",
        "checkpoints/last",
    ):
        path, kept = run_dir / name, tmp_path / "kept"
        if path.exists():
            path.rename(kept)
        path.mkdir()
        code, _, err = run()
        assert (code, f"{path}: the run writes this file" in err) == (2, True), err
        path.rmdir()
        if kept.exists():
            kept.rename(path)
    (run_dir / "views.png").unlink()
    (run_dir / "views.png").symlink_to(tmp_path / "nowhere" / "views.png")
    assert "views.png: the run writes this file" in run()[2]
    (run_dir / "views.png").unlink()
    (run_dir / "checkpoints").rename(tmp_path / "moved")
    (run_dir / "checkpoints").write_text("")
    code, _, err = run()
    assert (code, "checkpoints: the folder of checkpoints cannot be read" in err) == (2, True), err
    (run_dir / "checkpoints").unlink()
    (tmp_path / "moved").rename(run_dir / "checkpoints")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"(?m)^trainer:\n(  .*\n)+", "trainer: [1]\n", text))
    code, _, err = run()
    assert (code, "config.yaml: Cannot merge" in err) == (2, True), err
    (run_dir / "config.yaml").write_text(text)
    assert run("trainer.max_steps=3")[0] == 0


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
    run("run.name=base", "profile=true")
    index = ("mining.backend=faiss", "mining.index=IVF1,Flat", "mining.recall_every=1", "mining.min_fill=0.9")
    for name, more in {
        "nnclr": ("objective.name=nnclr", "trainer.max_steps=4"),
        "supcon": ("objective.name=supcon", "trainer.max_steps=4"),
        "index": ("data.name=images", *index, "trainer.max_steps=8"),
    }.items():
        assert run(f"run.name={name}", *more)[0] == 0
    logged = {column for each in (tmp_path / "runs").iterdir() for column in metrics(each)[0]}
    logged -= {"step", "epoch", "seconds"}
    assert {name for name in logged if describe(name) is None} == set()
    by_evaluations = {"probe/*", "knn/*", "stats/*"}
    by_accelerators = {"system/device_memory_mib"}
    patterns = METRICS.keys() - by_evaluations - by_accelerators
    assert {pattern for pattern in patterns if not fnmatch.filter(logged, pattern)} == set()


def test_a_bank_that_the_run_cannot_fill_is_named_at_the_start_and_at_the_end(run):
    code, result, err = run("bank.kind=queue", "bank.capacity=1000")
    assert code == 0
    assert result["bank_used"] is False
    lines = err.splitlines()
    (start,) = [number for number, line in enumerate(lines) if "the bank is never mined" in line]
    assert "lower bank.capacity to 440 or less" in lines[start]
    assert "queue bank of 1000" in "".join(lines[start:])
    assert err.count("no row of the bank was a negative in any of the 12 steps: it is filled to 9.6%") == 1
    _, result, err = run("run.name=fits", "bank.kind=queue", "bank.capacity=440")
    assert result["bank_used"] is True
    assert "the bank" not in err.replace("the bank starts empty", "")


def test_a_bank_that_unreadable_images_keep_from_filling_is_named_once(run, folder, tmp_path):
    (folder / "red" / "torn.png").write_bytes(b"no image")
    more = ("mining.min_fill=1", "data.max_corrupt=0.2", "data.name=images", "schedule.epochs=5")
    code, result, err = run(*more, "trainer.max_steps=23")
    assert code == 0
    assert result["bank_used"] is False
    assert err.count("no row of the bank has been a negative: it is filled to 98.0%, mining.min_fill=1") == 1
    assert "Set mining.min_fill=0.97 or less" in err
    assert err.count("no row of the bank was a negative in any of the 23 steps") == 1


def test_whether_the_bank_was_used_survives_a_resume(run):
    run("trainer.max_steps=11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchMining, "on_step", lambda *_: None)
        assert run()[1]["bank_used"] is True


def test_a_time_limit_ends_each_start_with_75_until_the_run_is_done(run, tmp_path, monkeypatch):
    run("run.name=whole")
    clock = itertools.count(0, 50)  # seconds that pass from one look to the next
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    codes = []
    for step in (4, 8, 12):
        code, result, err = run("trainer.max_time=00:00:03:20")
        codes.append((code, result["finished"]))
        assert result["steps"] == step
        told = "stopped by trainer.max_time after saving; the same command goes on from here"
        assert err.count(told) == (code == 75)
    assert codes == [(75, False), (75, False), (0, True)]  # the last step ends the run by itself
    assert same(weights(tmp_path / "runs/whole"), weights(tmp_path / "runs/tiny"))

"""Wrong input, and sizes that do not fit: exit code 2 before anything is written."""

from pathlib import Path

import pytest
import torch

from contrastive.module import ContrastiveModule
from tests.contrastive.pretrain.runs import table


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
        (
            ["optimizer.name=lars", "optimizer.sgd_momentum=1"],
            ["error: optimizer.sgd_momentum=1: optimizer.name=lars needs less than 1"],
        ),
        (["objective.symmetric=true", "augment.view_2.noise=0"], ["view_1 and view_2 differ", "in_batch"]),
        (["encoder.weights=missing.pth"], ["missing.pth"]),
        (["encoder.weights=~nosuchuser/w.pth"], ["encoder.weights=~nosuchuser/w.pth", "home folder"]),
        (
            ["data.name=images", "objective.name=supcon"],
            ["objective.name=supcon needs labels, and there are none; use data.name=imagefolder"],
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


@pytest.mark.parametrize(
    "given",
    ["WORLD_SIZE=", "WORLD_SIZE=-1", "WORLD_SIZE=0", "RANK=", "RANK=-1", "LOCAL_RANK=-1", "NODE_RANK=x"],
)
def test_a_launchers_variable_that_is_no_rank_is_named(run, tmp_path, monkeypatch, given):
    name, _, value = given.partition("=")
    monkeypatch.setenv(name, value)
    code, _, err = run()
    assert code == 2
    assert f"error: the environment has {name}={value!r}: a whole number" in err
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

    def build(config, image_size, frames):
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

"""A checkpoint to disk and back, and what a kill or a full disk leaves."""

import hashlib
import itertools
import json
import os
import random
import signal
import time
import warnings

import pytest
import torch

from contrastive.checkpoint.folder import latest_valid, remove_stale
from contrastive.checkpoint.integrity import verify
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO, SaveOptions
from memory_bank.state import read_state
from tests.contrastive.checkpoint.saves import contents, names, save
from tests.forked import run_forked


def test_round_trip_and_files(tmp_path):
    path = save(tmp_path)
    assert {file.name for file in path.iterdir()} == {
        "trainer.pt",
        "bank.safetensors",
        "encoder.safetensors",
        "manifest.json",
    }
    assert (tmp_path / "last").read_text() == "step-3\n"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert verify(path) == 3
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["format"] == 2

    loaded, expected = DirectoryCheckpointIO().load_checkpoint(path), contents()
    assert torch.equal(loaded["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert torch.equal(loaded["miner"]["keys"], expected["miner"]["keys"])
    assert loaded["miner"]["keys"].dtype == torch.float16
    assert loaded["miner"]["lists"] == [1, "a", None]
    assert loaded["epoch"] == 1
    assert "miner" not in torch.load(path / "trainer.pt", weights_only=True)
    assert set(read_state(path / "bank.safetensors")) == {"keys", "fill", "lists"}


def test_saving_leaves_the_dict_alone_and_needs_no_bank(tmp_path):
    checkpoint = {"global_step": 1}
    DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-1")
    assert checkpoint == {"global_step": 1}
    assert DirectoryCheckpointIO().load_checkpoint(tmp_path / "step-1") == {"global_step": 1}


def test_every_file_and_directory_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(old, new):
        calls.append(f"rename {new.name}")
        real_rename(old, new)

    def replace(old, new):
        calls.append(f"replace {new.name}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "checkpoints")
    bank, partial, pointer = calls[0], calls[2], calls[10]
    assert calls == [
        bank,
        "replace bank.safetensors",
        partial,
        "bank.safetensors",
        "encoder.safetensors",
        "trainer.pt",
        "manifest.json",
        partial,
        "rename step-3",
        "checkpoints",
        pointer,
        "replace last",
        "checkpoints",
    ]
    assert bank.startswith(".bank.safetensors.")
    assert partial.startswith(".step-3.")
    assert pointer.startswith(".last.")


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = save(tmp_path)
    (path / "bank.safetensors").unlink()
    assert save(tmp_path) == path
    assert verify(path) == 3
    assert names(tmp_path) == ["last", "step-3"]


def test_remove_checkpoint(tmp_path):
    path = save(tmp_path)
    DirectoryCheckpointIO().remove_checkpoint(path)
    DirectoryCheckpointIO().remove_checkpoint(path)
    assert names(tmp_path) == ["last"]


@pytest.mark.parametrize("size", [10, 3 << 18])  # noticed when the file is closed; inside torch.save
def test_without_someone_to_tell_a_full_disk_is_an_error(tmp_path, size):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = {"global_step": 1, "weights": torch.zeros(size)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_killed_anywhere_in_a_save_a_loadable_checkpoint_is_left(tmp_path):
    run_forked(kill_savers, tmp_path, 25, limit_s=120)
    systematic, randomly = json.loads((tmp_path / "outcomes.json").read_text())
    *killed, survived = systematic
    assert survived == [0, 4, 0, 0]
    assert len(killed) >= 18  # mkdir, flushes, renames, and each unlink of the removal of step-2
    assert all(line in ([1, 3, 0, 0], [1, 4, 0, 0]) for line in killed)
    # Once the new checkpoint is in place it is the one: never back to the old.
    assert [step for _, step, _, _ in killed] == sorted(step for _, step, _, _ in killed)

    assert len(randomly) == 25
    assert all(
        kill == 1 and step >= 1 and not warned and not hidden for kill, step, warned, hidden in randomly
    )
    assert len({step for _, step, _, _ in randomly}) > 2  # the kills came at different times


def kill_savers(number, root, random_kills):
    """Kill children of this process while they save checkpoints; write what is left after each."""
    torch.set_num_threads(1)
    os.fsync = os.fstat  # a kill is no power cut
    systematic, randomly, chooser = [], [], random.Random(0)
    while not systematic or systematic[-1][0]:  # a kill before each call of a save, until one survives it
        directory = root / f"at-{len(systematic)}"
        for step in (1, 2, 3):
            save_step(directory, step)
        pid = child(save_and_die, directory, len(systematic) + 1)
        systematic.append(outcome(directory, pid))
    for trial in range(random_kills):
        directory = root / f"random-{trial}"
        save_step(directory, 1)
        pid = child(save_forever, directory)
        time.sleep(chooser.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        randomly.append(outcome(directory, pid))
    (root / "outcomes.json").write_text(json.dumps([systematic, randomly]))


def save_step(directory, step):
    def extra(directory):
        (directory / "encoder.safetensors").write_bytes(b"x" * 5000)

    weights = {"w": torch.full((500,), step)}
    value = {"global_step": step, "state_dict": weights, "miner": {"k": torch.zeros(9)}}
    DirectoryCheckpointIO().save_checkpoint(
        value, directory / f"step-{step}", SaveOptions(extra, keep_last=2)
    )


def save_forever(directory):
    for step in range(2, 10**6):
        save_step(directory, step)


def save_and_die(directory, count):
    die_at(count)
    save_step(directory, 4)


def die_at(count):
    """Make the count-th of the calls that change the disk the last thing this process does not do."""
    calls = itertools.count(1)

    def wrap(real):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))


def child(work, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return pid


def outcome(directory, pid):
    """Return whether the child was killed, the step that loads, and the numbers of warnings and leftovers."""
    _, status = os.waitpid(pid, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        remove_stale(directory)
        found = latest_valid(directory)
        for path in directory.glob("step-*"):
            verify(path)
    load = DirectoryCheckpointIO().load_checkpoint
    step = -1 if found is None else int(load(found)["state_dict"]["w"][0])
    hidden = sum(path.name.startswith(".") for path in directory.iterdir())
    return [int(os.WIFSIGNALED(status)), step, len(caught), hidden]

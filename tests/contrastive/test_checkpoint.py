"""Checkpoints: what is accepted, what is refused, and what a kill, a full disk or a signal leaves behind."""

import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.equal import assert_same

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice on the tiny runs below, and its own use of deprecated torch and Python calls.
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


@pytest.fixture
def ck() -> Any:
    from contrastive import checkpoint

    return checkpoint


def contents(step: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "global_step": step,
        "epoch": 1,
        "state_dict": {"weight": torch.randn(5, 3, generator=generator)},
        "miner": {
            "keys": torch.randn(7, 2, generator=generator).half(),
            "fill": 0.5,
            "lists": [1, "a", None],
        },
    }


def extra(checkpoint: dict[str, Any], directory: Path) -> None:
    (directory / "encoder.safetensors").write_bytes(b"weights of step %d" % checkpoint["global_step"])


def save(ck: Any, root: Path, step: int = 3, keep_last: int | None = None) -> Path:
    path = root / f"step-{step}"
    ck.DirectoryCheckpointIO().save_checkpoint(contents(step), path, ck.SaveOptions(extra, keep_last))
    return path


def seal(path: Path, names: list[str], step: int = 3) -> None:
    """Write a manifest whose hashes are right, as an attacker would; independent of the code under test."""
    files = {}
    for name in names:
        data = (path / name).read_bytes() if (path / name).is_file() else b""
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"format": 2, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)


# ------------------------------------------------------------------------------------------ form and reading


def test_round_trip_and_files(ck: Any, tmp_path: Path) -> None:
    from memory_bank.state import read_state

    path = save(ck, tmp_path)
    assert {file.name for file in path.iterdir()} == {
        "trainer.pt",
        "bank.safetensors",
        "encoder.safetensors",
        "manifest.json",
    }
    assert (tmp_path / "last").read_text() == "step-3\n"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert ck.verify(path) == 3
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["format"] == 2

    loaded, expected = ck.DirectoryCheckpointIO().load_checkpoint(path), contents()
    assert torch.equal(loaded["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert torch.equal(loaded["miner"]["keys"], expected["miner"]["keys"])
    assert loaded["miner"]["keys"].dtype == torch.float16
    assert loaded["miner"]["lists"] == [1, "a", None]
    assert loaded["epoch"] == 1
    assert "miner" not in torch.load(path / "trainer.pt", weights_only=True)
    assert set(read_state(path / "bank.safetensors")) == {"keys", "fill", "lists"}


def test_saving_leaves_the_dict_alone_and_needs_no_bank(ck: Any, tmp_path: Path) -> None:
    checkpoint = {"global_step": 1}
    ck.DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-1")
    assert checkpoint == {"global_step": 1}
    assert ck.DirectoryCheckpointIO().load_checkpoint(tmp_path / "step-1") == {"global_step": 1}


def test_every_file_and_directory_is_flushed_before_the_rename(
    ck: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        calls.append(f"rename {Path(new).name}")
        real_rename(old, new)

    def replace(old: Path, new: Path) -> None:
        calls.append(f"replace {Path(new).name}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    save(ck, tmp_path / "checkpoints")
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


def test_what_could_not_be_loaded_is_not_saved(ck: Any, tmp_path: Path) -> None:
    checkpoint = contents() | {"callbacks": {"Monitor": {"best": Path("a")}}}
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['Monitor'\]\['best'\] is a pathlib"):
        ck.DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", ".hidden", "a b"])
def test_extra_files_have_plain_names(ck: Any, tmp_path: Path, name: str) -> None:
    options = ck.SaveOptions(lambda _, directory: (directory / name).write_text("x"))
    with pytest.raises(ValueError, match="extra_files wrote"):
        ck.DirectoryCheckpointIO().save_checkpoint(contents(), tmp_path / "step-3", options)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_found(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    generator = torch.Generator().manual_seed(0)
    flips = 0
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        places = range(len(data)) if file.name == "manifest.json" else range(0, len(data), len(data) // 15)
        for place in places:
            bit = 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(ck.CorruptCheckpoint, match="step-3"):
                ck.verify(path)
            flips += 1
        file.write_bytes(data)
    assert flips > 500
    assert ck.verify(path) == 3


def alter(kind: str, path: Path) -> None:
    manifest = path / "manifest.json"
    names = ["trainer.pt", "bank.safetensors", "encoder.safetensors"]
    if kind == "missing file":
        (path / "bank.safetensors").unlink()
    elif kind == "extra file":
        (path / "note.txt").write_text("mine")
    elif kind == "truncated file":
        os.truncate(path / "trainer.pt", 100)
    elif kind == "truncated manifest":
        os.truncate(manifest, 200)
    elif kind == "empty manifest":
        os.truncate(manifest, 0)
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "huge manifest":
        manifest.write_text(" " * (1 << 21) + manifest.read_text())
    elif kind == "deep manifest":
        manifest.write_text("[" * 200_000)
    elif kind == "repeated key":
        manifest.write_text(manifest.read_text().replace('"step": 3', '"step": 9,\n "step": 3'))
    elif kind == "file is a link":
        target = path.parent / "elsewhere.pt"
        (path / "bank.safetensors").rename(target)
        (path / "bank.safetensors").symlink_to(target)
    elif kind == "manifest is a link":
        manifest.rename(path.parent / "elsewhere.json")
        manifest.symlink_to(path.parent / "elsewhere.json")
    elif kind == "checkpoint is a link":
        path.rename(path.parent / "elsewhere")
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "checkpoint is a file":
        path.rename(path.parent / "elsewhere")
        path.write_text("trainer")
    elif kind == "no trainer":
        (path / "trainer.pt").unlink()
        seal(path, names[1:])
    elif kind == "other format":
        manifest.write_text(re_signed(manifest, format=3))
    elif kind == "step is no number":
        manifest.write_text(re_signed(manifest, step="3"))
    else:
        seal(path, [*names, kind])  # a file name


def re_signed(manifest: Path, **changes: Any) -> str:
    body = json.loads(manifest.read_text()) | changes
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing file", "bank.safetensors is missing"),
        ("extra file", "note.txt is not in the manifest"),
        ("truncated file", "trainer.pt: has 100 bytes"),
        ("truncated manifest", "truncated or altered"),
        ("empty manifest", "truncated or altered"),
        ("no manifest", "a partial save"),
        ("huge manifest", "truncated or altered"),
        ("deep manifest", "truncated or altered"),
        ("repeated key", "differs from its own SHA-256"),
        ("file is a link", "links are refused"),
        ("manifest is a link", "links are refused"),
        ("checkpoint is a link", "not a directory"),
        ("checkpoint is a file", "not a directory"),
        ("no trainer", "lists no trainer.pt"),
        ("other format", "format 3, this version reads 2"),
        ("step is no number", "lists no trainer.pt"),
        ("../elsewhere.pt", "only plain names"),
        ("/etc/passwd", "only plain names"),
        ("..", "only plain names"),
        ("a\\b", "only plain names"),
        ("trainer.pt\n", "only plain names"),
        ("manifest.json", "only plain names"),
    ],
)
def test_altered_checkpoints_are_refused_and_the_previous_one_is_used(
    ck: Any, tmp_path: Path, kind: str, says: str
) -> None:
    older, newer = save(ck, tmp_path, 2), save(ck, tmp_path, 3)
    (tmp_path / "elsewhere.pt").write_bytes(b"")
    alter(kind, newer)
    with pytest.raises(ck.CorruptCheckpoint, match=says):
        ck.verify(newer)
    with pytest.raises(ck.CorruptCheckpoint, match="step-3"):
        ck.DirectoryCheckpointIO().load_checkpoint(newer)
    with pytest.warns(UserWarning, match=r"checkpoint skipped: .*step-3.*") as record:
        assert ck.latest_valid(tmp_path) == older
    assert len(record) == 1


def test_latest_valid_of_nothing(ck: Any, tmp_path: Path) -> None:
    assert ck.latest_valid(tmp_path / "none") is None
    assert ck.latest_valid(tmp_path, clean=True) is None
    assert ck.read_last(tmp_path) is None


def test_latest_is_by_number_not_by_name(ck: Any, tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(ck, tmp_path, step)
    assert ck.latest_valid(tmp_path) == tmp_path / "step-100"


@pytest.mark.parametrize("text", ["step-9\n", "../step-3\n", "step-3/../../x\n", "", "\xff"])
def test_the_pointer_names_an_existing_checkpoint_or_nothing(ck: Any, tmp_path: Path, text: str) -> None:
    path = save(ck, tmp_path)
    assert ck.read_last(tmp_path) == path
    (tmp_path / "last").write_bytes(text.encode("latin1"))
    assert ck.read_last(tmp_path) is None


# ------------------------------------------------------------------------------------------- untrusted files


class Payload:
    """Unpickling it writes a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["trainer.pt", "bank.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    ck: Any, tmp_path: Path, file: str, legacy: bool
) -> None:
    path = save(ck, tmp_path)
    payload = {"state_dict": {}, "evil": Payload(tmp_path / "ran")}
    torch.save(payload, path / file, _use_new_zipfile_serialization=not legacy)
    seal(path, ["trainer.pt", "bank.safetensors", "encoder.safetensors"])
    assert ck.verify(path) == 3  # the hashes are right: only the loader can refuse it
    with pytest.raises(ck.CorruptCheckpoint, match=r"refused|not a valid safetensors file"):
        ck.DirectoryCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_trainer_file_that_is_no_dict_is_refused(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    torch.save([1], path / "trainer.pt")
    seal(path, ["trainer.pt", "bank.safetensors", "encoder.safetensors"])
    with pytest.raises(ck.CorruptCheckpoint, match="holds a list, a dict is needed"):
        ck.DirectoryCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_environment_cannot_switch_pickle_on(
    ck: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    path = save(ck, tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(ck.UserError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        ck.DirectoryCheckpointIO().load_checkpoint(path)


def test_the_caller_cannot_either(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    with pytest.raises(ck.UserError, match="weights_only=False"):
        ck.DirectoryCheckpointIO().load_checkpoint(path, weights_only=False)


# -------------------------------------------------------------------------------------------- keeping, kills


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_keep_last(ck: Any, tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save(ck, tmp_path, step, keep_last=2)
        assert ck.read_last(tmp_path) == tmp_path / f"step-{step}"
    assert names(tmp_path) == ["last", "step-10", "step-11"]
    assert ck.verify(tmp_path / "step-10") == 10


def test_a_run_that_went_back_abandons_what_came_after(ck: Any, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(ck, tmp_path, step)
    save(ck, tmp_path, 15, keep_last=2)
    assert names(tmp_path) == ["last", "step-10", "step-15"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    (path / "bank.safetensors").unlink()
    assert save(ck, tmp_path) == path
    assert ck.verify(path) == 3
    assert names(tmp_path) == ["last", "step-3"]


def test_stale_temporaries_go_and_strangers_stay(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    for stale in (".step-4.0123abcd.partial", ".step-1.0123abcd.removed"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "trainer.pt").write_text("half")
    (tmp_path / ".last.0123abcd.partial").write_text("st")
    (tmp_path / ".mine").mkdir()
    assert ck.latest_valid(tmp_path) == path
    assert len(names(tmp_path)) == 6  # a reader removes nothing: the writer may be at work
    assert ck.latest_valid(tmp_path, clean=True) == path
    assert names(tmp_path) == [".mine", "last", "step-3"]


def test_remove_checkpoint(ck: Any, tmp_path: Path) -> None:
    path = save(ck, tmp_path)
    ck.DirectoryCheckpointIO().remove_checkpoint(path)
    ck.DirectoryCheckpointIO().remove_checkpoint(path)
    assert names(tmp_path) == ["last"]


KILLER = '''
"""Children of this process save checkpoints 1, 2, 3, ... and are killed; prints what is left after each."""
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from contrastive import checkpoint as ck

root, random_kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
FUNCTIONS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")]

def extra(checkpoint, directory):
    (directory / "encoder.safetensors").write_bytes(b"x" * 5000)

def save(directory, step):
    weights = {"w": torch.full((500,), step)}
    value = {"global_step": step, "state_dict": weights, "miner": {"k": torch.zeros(9)}}
    options = ck.SaveOptions(extra, keep_last=2)
    ck.DirectoryCheckpointIO().save_checkpoint(value, directory / f"step-{step}", options)

def die_at(count):
    """Make the count-th of the calls that change the disk the last thing this process does not do."""
    seen = 0
    def wrap(real):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for module, name in FUNCTIONS:
        setattr(module, name, wrap(getattr(module, name)))

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def outcome(directory, pid):
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ck.latest_valid(directory, clean=True)
        for path in directory.glob("step-*"):
            ck.verify(path)
    load = ck.DirectoryCheckpointIO().load_checkpoint
    step = -1 if found is None else int(load(found)["state_dict"]["w"][0])
    hidden = sum(path.name.startswith(".") for path in directory.iterdir())
    print(int(killed), step, len(caught), hidden, flush=True)
    return killed

count = 0
while True:  # a kill before each call of the third save, until one survives it
    count += 1
    directory = root / f"at-{count}"
    save(directory, 1); save(directory, 2); save(directory, 3)
    pid = child(lambda: (die_at(count), save(directory, 4)))
    killed = outcome(directory, pid)
    if not killed:
        break
print("random", flush=True)
chooser = random.Random(0)
for trial in range(random_kills):
    directory = root / f"random-{trial}"
    save(directory, 1)
    def forever():
        for step in range(2, 10**6):
            save(directory, step)
    pid = child(forever)
    time.sleep(chooser.uniform(0.01, 0.2))
    os.kill(pid, signal.SIGKILL)
    outcome(directory, pid)
'''


def test_killed_anywhere_in_a_save_a_loadable_checkpoint_is_left(tmp_path: Path) -> None:
    result = run_script(KILLER, str(tmp_path), "25")
    systematic, _, randomly = result.stdout.partition("random\n")
    outcomes = [tuple(map(int, line.split())) for line in systematic.splitlines()]
    *killed, survived = outcomes
    assert survived == (0, 4, 0, 0)
    assert len(killed) >= 18  # mkdir, flushes, renames, and each unlink of the removal of step-2
    assert all(line in {(1, 3, 0, 0), (1, 4, 0, 0)} for line in killed)
    # Once the new checkpoint is in place it is the one: never back to the old.
    assert [step for _, step, _, _ in killed] == sorted(step for _, step, _, _ in killed)

    outcomes = [tuple(map(int, line.split())) for line in randomly.splitlines()]
    assert len(outcomes) == 25
    assert all(
        kill == 1 and step >= 1 and not warned and not hidden for kill, step, warned, hidden in outcomes
    )
    assert len({step for _, step, _, _ in outcomes}) > 2  # the kills came at different times


def run_script(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


# ------------------------------------------------------------------------------------------------- Lightning


class Loader:
    """Batches of an epoch as a pure function of (epoch, index); continues where its state says."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.delivered = batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            generator = torch.Generator().manual_seed(1000 + self.delivered)
            self.delivered += 1
            yield torch.randn(4, 8, generator=generator)
            if self.delivered % self.batches == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"delivered": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.delivered = state["delivered"]


def make_module(events: Any) -> Any:
    """A network with momentum, a schedule and a bank; ``events(step)`` is called for each batch."""
    from pytorch_lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
            )
            self.bank = torch.zeros(5, 8)
            self.losses: dict[int, float] = {}

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            events(self.trainer.global_step)
            loss: torch.Tensor = (
                (self.net(batch) - self.bank.mean() + batch.sum(1, keepdim=True)).square().mean()
            )
            self.losses[self.trainer.fit_loop.total_batch_idx] = loss.item()
            return loss

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.bank[self.trainer.global_step % 5] = self.net[0].weight.detach().mean(0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_end(self) -> None:
            self.handler_at_end = signal.getsignal(signal.SIGTERM)  # before Lightning restores what it knows

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["miner"] = {"bank": self.bank.clone()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.bank = checkpoint["miner"]["bank"]

    return Module()


def fit(
    ck: Any,
    root: Path,
    *,
    every_steps: int | None = None,
    keep_last: int = 99,
    resume: Path | None = None,
    events: Any = lambda step: None,
    callbacks: tuple[Any, ...] = (),
    accumulate: int = 2,
    ranks: int = 1,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Two epochs of 6 batches; returns trainer, module and the Preemption callback."""
    from pytorch_lightning import Trainer

    saver = ck.SaveCheckpoint(root, every_steps, keep_last, extra)
    preemption = ck.Preemption(saver)
    module = make_module(events)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        default_root_dir=root.parent,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        plugins=[ck.DirectoryCheckpointIO()],
        callbacks=[saver, preemption, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, Loader(), ckpt_path=resume, weights_only=True)
    return trainer, module, preemption


def state_of(path: Path) -> dict[str, Any]:
    from memory_bank.state import read_state

    state: dict[str, Any] = torch.load(path / "trainer.pt", weights_only=True)
    return state | {"bank": read_state(path / "bank.safetensors")}


def test_resume_from_every_checkpoint_is_equal_to_the_bit(ck: Any, tmp_path: Path) -> None:
    _, whole, _ = fit(ck, tmp_path / "whole", every_steps=1)
    final = state_of(tmp_path / "whole" / "step-6")
    assert names(tmp_path / "whole") == ["last", *(f"step-{step}" for step in range(1, 7))]
    for step in (1, 2, 3, 4, 5):  # 3 is the end of the first epoch
        root = tmp_path / f"resumed-{step}"
        trainer, module, _ = fit(ck, root, every_steps=1, resume=tmp_path / "whole" / f"step-{step}")
        assert trainer.global_step == 6
        resumed = state_of(root / "step-6")
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "bank", "global_step", "epoch"):
            assert_same(resumed[key], final[key], f"step {step}: {key}")
        # batches are numbered through the whole run: exactly the rest was trained on, with the same losses
        assert module.losses == {index: loss for index, loss in whole.losses.items() if index >= 2 * step}
        assert names(root) == [
            "last",
            *(f"step-{later}" for later in range(step + 1, 7)),
        ]  # step itself is there


def test_epoch_ends_are_saved_once_and_resume_equally(ck: Any, tmp_path: Path) -> None:
    saved: list[int] = []
    io = ck.DirectoryCheckpointIO
    original = io.save_checkpoint

    def counting(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        saved.append(checkpoint["global_step"])
        original(self, checkpoint, path, storage_options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "save_checkpoint", counting)
        fit(ck, tmp_path / "whole")
    assert saved == [3, 6]
    assert (tmp_path / "whole/step-6/encoder.safetensors").read_bytes() == b"weights of step 6"
    _, module, _ = fit(ck, tmp_path / "resumed", resume=tmp_path / "whole" / "step-3")
    assert len(module.losses) == 6
    one, other = state_of(tmp_path / "whole" / "step-6"), state_of(tmp_path / "resumed" / "step-6")
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["bank"], other["bank"])


def test_the_end_is_saved_and_keep_last_is_kept(ck: Any, tmp_path: Path) -> None:
    fit(ck, tmp_path / "c", every_steps=4, keep_last=1)
    assert names(tmp_path / "c") == ["last", "step-6"]
    fit(ck, tmp_path / "d", every_steps=2, keep_last=2)
    assert names(tmp_path / "d") == ["last", "step-4", "step-6"]


def test_a_finished_run_resumed_saves_nothing(ck: Any, tmp_path: Path) -> None:
    fit(ck, tmp_path / "c", every_steps=3)
    before = (tmp_path / "c/step-6/manifest.json").stat().st_mtime_ns
    trainer, module, _ = fit(ck, tmp_path / "c", every_steps=3, resume=tmp_path / "c" / "step-6")
    assert module.losses == {}
    assert trainer.global_step == 6
    assert (tmp_path / "c/step-6/manifest.json").stat().st_mtime_ns == before


def test_another_checkpoint_io_is_refused(ck: Any, tmp_path: Path) -> None:
    from pytorch_lightning import Trainer

    saver = ck.SaveCheckpoint(tmp_path)
    trainer = Trainer(
        callbacks=[saver], logger=False, enable_progress_bar=False, max_epochs=1, accelerator="cpu"
    )
    with pytest.raises(ValueError, match="DirectoryCheckpointIO"):
        trainer.fit(make_module(lambda step: None), Loader())


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"keep_last": 0}])
def test_ranges(ck: Any, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"=0: allowed is 1 or more"):
        ck.SaveCheckpoint(tmp_path, **options)


def test_a_full_disk_is_reported_once_and_loses_nothing(ck: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_for_a_while(step: int) -> None:  # no file may grow beyond 1,000 bytes: a write fails half way
        size = 1000 if step in (2, 3) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with pytest.warns(UserWarning, match="saving failed") as record:
            trainer, _, _ = fit(ck, tmp_path / "c", every_steps=1, events=full_for_a_while)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    messages = [str(one.message) for one in record if "saving failed" in str(one.message)]
    assert len(messages) == 1
    assert "step-3: saving failed (File too large)" in messages[0]
    assert trainer.global_step == 6
    assert names(tmp_path / "c") == ["last", "step-1", "step-2", "step-5", "step-6"]
    for step in (1, 2, 5, 6):
        assert ck.verify(tmp_path / "c" / f"step-{step}") == step


@pytest.mark.parametrize("size", [10, 3 << 18])  # noticed when the file is closed; inside torch.save
def test_without_someone_to_tell_a_full_disk_is_an_error(ck: Any, tmp_path: Path, size: int) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = {"global_step": 1, "weights": torch.zeros(size)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            ck.DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


# ----------------------------------------------------------------------------------------------- pre-emption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_the_end_of_its_step_and_the_resume_is_exact(
    ck: Any, tmp_path: Path, name: str
) -> None:
    _, whole, _ = fit(ck, tmp_path / "whole")
    number = signal.Signals[name]
    before = signal.getsignal(number)
    seen: list[int] = []

    def send(step: int) -> None:
        seen.append(step)
        if len(seen) == 3:  # the first of the two batches of the second step
            os.kill(os.getpid(), number)

    trainer, module, preemption = fit(ck, tmp_path / "c", events=send, min_epochs=2)
    assert preemption.stopped_by == name
    assert getattr(module.handler_at_end, "__self__", None) is not preemption
    assert trainer.global_step == 2
    assert seen == [0, 0, 1, 1]
    assert names(tmp_path / "c") == ["last", "step-2"]
    assert signal.getsignal(number) == before

    _, module, preemption = fit(ck, tmp_path / "c", resume=ck.latest_valid(tmp_path / "c"))
    assert preemption.stopped_by is None
    assert module.losses == {index: loss for index, loss in whole.losses.items() if index >= 4}
    one, other = state_of(tmp_path / "whole" / "step-6"), state_of(tmp_path / "c" / "step-6")
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["bank"], other["bank"])


def test_a_signal_just_before_the_first_batch_is_taken_over_from_lightning(ck: Any, tmp_path: Path) -> None:
    from pytorch_lightning import Callback

    class Early(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # runs before Preemption: Lightning's handler gets it

    trainer, _, preemption = fit(ck, tmp_path / "c", callbacks=(Early(),))
    assert preemption.stopped_by == "SIGTERM"
    assert trainer.global_step == 1
    assert ck.latest_valid(tmp_path / "c") == tmp_path / "c" / "step-1"


def test_handlers_are_handed_back_after_a_failure(ck: Any, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def fail(step: int) -> None:
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(ck, tmp_path / "c", events=fail)
    assert {number: signal.getsignal(number) for number in before} == before


RANKS = '''
"""Two ranks; only rank 1 gets the signal, and the disk of rank 0 is full at step 2."""
import os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, os.getcwd())
from contrastive import checkpoint as ck
from pytorch_lightning.strategies import DDPStrategy
from tests.contrastive.test_checkpoint import fit

rank = int(os.environ["LOCAL_RANK"])
count = 0

def send(step):
    global count
    count += 1
    ck.sync = full if rank == 0 and step == 1 else sync
    if rank == 1 and count == 4:
        os.kill(os.getpid(), signal.SIGTERM)

sync = ck.sync
def full(path):
    raise OSError(28, "No space left on device")

trainer, _, preemption = fit(
    ck, Path(sys.argv[1]), every_steps=1, events=send, accumulate=1,
    strategy=DDPStrategy(process_group_backend="gloo"), ranks=2,
)
print(rank, trainer.global_step, preemption.stopped_by, flush=True)
'''


def test_ranks_agree_on_stopping_and_survive_a_full_disk(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = tmp_path / "c"
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == ["0 4 SIGTERM", "1 4 SIGTERM"]
    assert names(root) == ["last", "step-1", "step-3", "step-4"]

"""Check that damaged and hostile files are refused, never executed or followed, and older ones are used."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from contrastive.checkpoint.integrity import CorruptCheckpoint, verify
from contrastive.config import UserError
from contrastive.encoders.weights import load_encoder
from memory_bank.state import load_state

FILES = ("trainer.pt", "bank.safetensors", "encoder.safetensors")


@pytest.fixture
def target(lab, whole):
    """Return a run killed just after its last checkpoint, step 12 of 12; it also has that of step 8."""
    lab.folder = whole.folder().parents[1]  # the same photos
    run_dir = lab.folder / "runs" / "target"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(whole.folder(), run_dir)
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("name: ranks-1", "name: target"))
    (run_dir / "summary.json").unlink()
    (run_dir / "encoder.safetensors").unlink()
    return run_dir


class Payload:
    """Unpickling it makes a directory: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def seal(checkpoint: Path, *more: str, **changes: object) -> None:
    """Write a manifest whose hashes are right, as an attacker would."""
    files = {}
    for name in (*FILES, *more):
        data = (checkpoint / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"format": 2, "step": 12, "files": files} | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"
    (checkpoint / "manifest.json").write_text(text)


def pickled(name: str, **options: object):
    def attack(newest: Path, ran: Path) -> None:
        content = torch.load(newest / name, weights_only=True) if name == "trainer.pt" else {}
        torch.save(content | {"evil": Payload(ran)}, newest / name, **options)
        seal(newest)

    return attack


def outside(newest: Path, ran: Path) -> None:
    shutil.copy(newest / "bank.safetensors", newest.parents[1] / "elsewhere.safetensors")
    seal(newest, "../../elsewhere.safetensors")


def linked_file(newest: Path, ran: Path) -> None:
    (newest / "bank.safetensors").rename(newest.parents[1] / "elsewhere.safetensors")
    (newest / "bank.safetensors").symlink_to("../../elsewhere.safetensors")


def linked_folder(newest: Path, ran: Path) -> None:
    newest.rename(newest.parents[1] / "elsewhere")
    newest.symlink_to("../elsewhere")


def from_environment(newest: Path, ran: Path) -> None:
    config = newest.parents[1] / "config.yaml"
    config.write_text(config.read_text().replace("name: images", "name: ${oc.env:SECRET}"))


def yaml_tag(newest: Path, ran: Path) -> None:
    config = newest.parents[1] / "config.yaml"
    config.write_text(f"{config.read_text()}\nevil: !!python/object/apply:os.mkdir ['{ran}']\n")


ATTACKS = {
    "code in trainer.pt": (pickled("trainer.pt"), 2, "refused, more than tensors"),
    "code in the bank": (pickled("bank.safetensors"), 2, "not a valid safetensors file"),
    "code in an old pickle": (
        pickled("trainer.pt", _use_new_zipfile_serialization=False),
        2,
        "refused, more than tensors",
    ),
    "code, and the environment allows it": (pickled("trainer.pt"), 2, "refused, more than tensors"),
    "code in config.yaml": (yaml_tag, 2, "not a readable yaml file"),
    "a secret of the environment": (from_environment, 2, "holds an interpolation"),
    "a name that leaves the directory": (outside, 0, "only plain names are allowed"),
    "a file that is a link": (linked_file, 0, "links are refused"),
    "a directory that is a link": (linked_folder, 0, "not a directory"),
    "no manifest": (lambda newest, ran: (newest / "manifest.json").unlink(), 0, "a partial save"),
    "cut short": (lambda newest, ran: os.truncate(newest / "trainer.pt", 1000), 0, "has 1000 bytes"),
    "a later format": (lambda newest, ran: seal(newest, format=9), 0, "format 9, this version reads 2"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_or_broken_checkpoint_is_refused(lab, whole, target, name):
    """Exit code 2, or the checkpoint before it is used, with a warning; either way nothing was executed."""
    attack, code, says = ATTACKS[name]
    ran = lab.folder / "ran"
    attack(target / "checkpoints" / "step-12", ran)
    env = {"SECRET": "digits"}
    if "environment allows" in name:
        env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    ended = lab.run("target", env=env)
    assert ended.codes == [code], ended.err
    assert says in ended.err[0]
    assert not ran.exists()
    if code == 0:
        from tests.faults.harness import outcome

        assert "step-12" in ended.err[0]
        outcome(target).assert_equals(whole())


def test_the_attacks_work(tmp_path):
    """Without the checks it would be executed: the payload runs when loaded in the way torch warns of."""
    torch.save({"evil": Payload(tmp_path / "ran")}, tmp_path / "trainer.pt")
    torch.load(tmp_path / "trainer.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def altered(data: bytes, chance: random.Random) -> bytes:
    place, flip = chance.randrange(len(data)), chance.randrange(1, 256)
    return data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]


def test_flipped_byte_is_detected_at_200_places(target, whole):
    """The resume detects it in checkpoints, the inspection in the bank, the evaluation in the encoder."""

    def load_all(checkpoint):
        verify(checkpoint)

    newest, chance, detected = target / "checkpoints" / "step-12", random.Random(5), 0
    copy = shutil.copy(whole.folder() / "encoder.safetensors", target / "encoder.safetensors")
    checks = [(newest / name, load_all, newest, CorruptCheckpoint) for name in (*FILES, "manifest.json")]
    checks += [(newest / "bank.safetensors", load_state, newest / "bank.safetensors", ValueError)]
    checks += [(Path(copy), load_encoder, Path(copy), UserError)]
    for number in range(200):
        file, read, path, error = checks[number % len(checks)]
        data = file.read_bytes()
        file.write_bytes(altered(data, chance))
        with pytest.raises(error):
            read(path)
        file.write_bytes(data)
        detected += 1
    assert detected == 200
    for _, read, path, _ in checks:
        read(path)


@pytest.mark.parametrize("flips", [2, pytest.param(200, marks=pytest.mark.faults)])
def test_flipped_byte_makes_the_run_go_on_from_the_checkpoint_before(lab, whole, target, flips):
    from tests.faults.harness import outcome

    newest, chance = target / "checkpoints" / "step-12", random.Random(6)
    saved = lab.folder / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    target.rename(saved)
    for number in range(flips):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saved, target)
        file = newest / (*FILES, "manifest.json")[number % 4]
        file.write_bytes(altered(file.read_bytes(), chance))
        ended = lab.run("target")
        assert ended.codes == [0], ended.err
        assert f"checkpoint skipped: {newest}" in ended.err[0]
        outcome(target).assert_equals(whole())

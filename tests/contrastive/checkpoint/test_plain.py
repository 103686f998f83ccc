"""Files that would run code when unpickled: not written, not read, whatever the environment says."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from contrastive.checkpoint.integrity import CorruptCheckpoint, verify
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from contrastive.config import UserError
from tests.contrastive.checkpoint.saves import FILES, contents, save, seal


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    checkpoint = contents() | {"callbacks": {"Monitor": {"best": Path("a")}}}
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['Monitor'\]\['best'\] is a pathlib"):
        DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-3")
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Unpickling it writes a file: the proof that code ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["trainer.pt", "bank.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, file, legacy):
    path = save(tmp_path)
    payload = {"state_dict": {}, "evil": Payload(tmp_path / "ran")}
    torch.save(payload, path / file, _use_new_zipfile_serialization=not legacy)
    seal(path, FILES)
    assert verify(path) == 3  # the hashes are right: only the loader can refuse it
    with pytest.raises(CorruptCheckpoint, match=r"refused|not a valid safetensors file"):
        DirectoryCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_trainer_file_that_is_no_dict_is_refused(tmp_path):
    path = save(tmp_path)
    torch.save([1], path / "trainer.pt")
    seal(path, FILES)
    with pytest.raises(CorruptCheckpoint, match="holds a list, a dict is needed"):
        DirectoryCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_environment_cannot_switch_pickle_on(tmp_path, monkeypatch, value):
    path = save(tmp_path)
    torch.save({"state_dict": {}, "evil": Payload(tmp_path / "ran")}, path / "trainer.pt")
    seal(path, FILES)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(CorruptCheckpoint, match="refused"):
        DirectoryCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_the_caller_cannot_either(tmp_path):
    path = save(tmp_path)
    with pytest.raises(UserError, match="weights_only=False"):
        DirectoryCheckpointIO().load_checkpoint(path, weights_only=False)

"""Every byte of a checkpoint is vouched for; whatever differs is refused, and the one before is used."""

import json
import os

import pytest
import torch

from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.integrity import CorruptCheckpoint, verify
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO, SaveOptions
from tests.contrastive.checkpoint.saves import FILES, contents, save, seal, signed


@pytest.mark.parametrize("name", ["manifest.json", ".hidden", "a b"])
def test_extra_files_have_plain_names(tmp_path, name):
    options = SaveOptions(lambda directory: (directory / name).write_text("x"))
    with pytest.raises(ValueError, match="extra_files wrote"):
        DirectoryCheckpointIO().save_checkpoint(contents(), tmp_path / "step-3", options)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_found(tmp_path):
    path = save(tmp_path)
    generator = torch.Generator().manual_seed(0)
    flips = 0
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        places = range(len(data)) if file.name == "manifest.json" else range(0, len(data), len(data) // 15)
        for place in places:
            bit = 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(CorruptCheckpoint, match="step-3"):
                verify(path)
            flips += 1
        file.write_bytes(data)
    assert flips > 500
    assert verify(path) == 3


def alter(kind, path):
    manifest = path / "manifest.json"
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
        seal(path, FILES[1:])
    elif kind == "other format":
        change(manifest, format=3)
    elif kind == "step is no number":
        change(manifest, step="3")
    else:
        seal(path, [*FILES, kind])  # a file name


def change(manifest, **changes):
    body = json.loads(manifest.read_text()) | changes
    del body["sha256"]
    manifest.write_text(signed(body))


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
def test_altered_checkpoints_are_refused_and_the_previous_one_is_used(tmp_path, kind, says):
    older, newer = save(tmp_path, 2), save(tmp_path, 3)
    (tmp_path / "elsewhere.pt").write_bytes(b"")
    alter(kind, newer)
    with pytest.raises(CorruptCheckpoint, match=says):
        verify(newer)
    with pytest.raises(CorruptCheckpoint, match="step-3"):
        DirectoryCheckpointIO().load_checkpoint(newer)
    with pytest.warns(UserWarning, match=r"checkpoint skipped: .*step-3.*") as record:
        assert latest_valid(tmp_path) == older
    assert len(record) == 1

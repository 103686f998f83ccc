"""Files that appear whole or not at all."""

import os

import pytest

from memory_bank import replacing as module
from memory_bank.replacing import replacing


def test_a_file_is_replaced_when_the_block_ends_and_stays_where_it_fails(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
    assert path.read_text() == "new"
    with pytest.raises(TypeError), replacing(path) as partial:
        partial.write_text(1)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_what_takes_the_place_is_on_the_disk_first_and_the_name_after(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(module, "sync", lambda path: done.append(("sync", path.name)))
    monkeypatch.setattr(module.os, "replace", lambda old, new: done.append(("replace", new.name)))
    with module.replacing(tmp_path / "bank") as partial:
        partial.write_text("")
    assert done == [("sync", partial.name), ("replace", "bank"), ("sync", tmp_path.name)]

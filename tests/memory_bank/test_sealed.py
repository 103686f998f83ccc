import hashlib
import json
import os
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from memory_bank.sealed import FormatError, read, write


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(3, 5, generator=generator)
    return {
        "f32": floats,
        "f64": floats.double(),
        "f16": floats.half(),
        "bf16": floats.bfloat16(),
        "i64": torch.tensor([-(2**62), 2**62]),
        "i32": torch.arange(3, dtype=torch.int32),
        "i16": torch.arange(5, dtype=torch.int16),
        "i8": torch.arange(-3, 4, dtype=torch.int8),
        "u8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([[True], [False], [True]]),
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "view": floats.T,
        "naïve, 名": torch.ones(1),
    }


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def test_the_library_reads_what_we_write(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, tensors, {"step": "3", "ключ": "значение"})
    assert_same(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        seal = file.metadata()["seal"]
        assert file.metadata() == {"step": "3", "ключ": "значение", "seal": seal}
    unsealed = path.read_bytes().replace(seal.encode(), b"0" * 64)
    assert hashlib.sha256(unsealed).hexdigest() == seal


def test_we_read_what_the_library_writes(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    whole = {name: value.contiguous() for name, value in tensors.items()}
    given = {letter: letter.upper() for letter in "stepname"}
    safetensors.torch.save_file(whole, path, given)
    got, metadata = read(path)
    assert_same(got, tensors)
    assert list(metadata.items()) == sorted(given.items())


def test_no_tensors_and_no_metadata(tmp_path):
    write(tmp_path / "a.safetensors", {}, {})
    tensors, metadata = read(tmp_path / "a.safetensors")
    assert (tensors, set(metadata)) == ({}, {"seal"})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors") == {}


def test_empty_arrays_of_numpy_are_written(tmp_path):
    """Their stride is 0; an index without a code has one."""
    path = tmp_path / "file.safetensors"
    write(path, {"code": torch.from_numpy(np.zeros(0, np.float32)), "ids": torch.arange(3)}, {})
    found, _ = read(path)
    assert found["code"].shape == (0,)
    assert found["ids"].tolist() == [0, 1, 2]


def test_equal_contents_give_equal_bytes(tensors, tmp_path):
    write(tmp_path / "a", tensors, {"x": "y"})
    write(tmp_path / "b", dict(reversed(tensors.items())), {"x": "y"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_are_writable_and_their_own(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, tensors, {})
    got = read(path)[0]
    other = bytes(path.stat().st_size)
    with path.open("r+b") as file:  # not anew, which would end a process that has it mapped
        file.write(other)
    assert_same(got, tensors)
    got["f32"].zero_()
    assert path.read_bytes() == other


def test_the_umask_decides_who_may_read(tmp_path):
    usual = os.umask(0o027)
    try:
        write(tmp_path / "a.safetensors", {}, {})
    finally:
        os.umask(usual)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.uint16)]
)
def test_an_unknown_dtype_is_refused(tensor, tmp_path):
    with pytest.raises(ValueError, match=r"'x' \(torch\..*allowed are torch\.float64"):
        write(tmp_path / "a.safetensors", {"x": tensor}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "metadata"), [({}, {"a": "\ud800"}), ({"\ud800": torch.zeros(1)}, {})], ids=["value", "name"]
)
def test_what_utf8_cannot_hold_is_refused(tensors, metadata, tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        write(tmp_path / "a.safetensors", tensors, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tensors, tmp_path, monkeypatch, call):
    path = tmp_path / "a.safetensors"
    write(path, tensors, {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write(path, {"x": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_data_reach_the_disk_before_the_name(tensors, tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names))[1])
    write(tmp_path / "a.safetensors", tensors, {})
    assert calls == ["sync", "replace", "sync"]


def pack(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)
BROKEN = {
    "empty file": b"",
    "header beyond the end": pack({"a": entry()}, EIGHT, length=10_000),
    "header of 2**64 - 1 bytes": pack({"a": entry()}, EIGHT, length=2**64 - 1),
    "not json": pack(b"{'a': 1}"),
    "deep nesting": pack(b"[" * 100_000 + b"]" * 100_000),
    "unknown dtype": pack({"a": entry(dtype="O8")}, EIGHT),
    "dtype that torch has not": pack({"a": entry(dtype="F6_E2M3", shape=(4,), offsets=(0, 3))}, bytes(3)),
    "shape that torch has not": pack({"a": entry(shape=(0, 2**63), offsets=(0, 0))}),
    "shape whose strides overflow": pack({"a": entry(shape=(0, 2**62, 2**62, 2**62), offsets=(0, 0))}),
    "shape and bytes differ": pack({"a": entry(shape=(3,))}, EIGHT),
    "beyond the data": pack({"a": entry()}, bytes(4)),
    "data left over": pack({"a": entry()}, bytes(12)),
    "an overlap": pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "metadata of numbers": pack({"__metadata__": {"x": 3}}),
    "a seal that does not hold": pack({"__metadata__": {"seal": "0" * 64}}),
    "a pickle": b"\x80\x04\x95" + bytes(40),
    "a zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(name, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(FormatError, match=r"broken\.safetensors: not a valid safetensors file: "):
        read(path)


def test_no_truncation_and_no_altered_byte_gets_through(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": torch.arange(6.0), "y": torch.arange(3)}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read(path)
    name = range(whole.index(b'"seal"') + 1, whole.index(b'"seal"') + 5)
    for place, byte in enumerate(whole):
        for flip in (1, 0x20, 0x80, 0x2A):  # 0x2A makes a line end of a space, which JSON would pass over
            path.write_bytes(whole[:place] + bytes([byte ^ flip]) + whole[place + 1 :])
            try:
                assert "seal" not in read(path)[1]  # what needs one sees that there is none
                assert place in name
            except FormatError:
                pass


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.safetensors")

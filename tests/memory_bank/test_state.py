import json
import pickle

import pytest
import torch

from memory_bank import sealed
from memory_bank.__main__ import main
from memory_bank.state import find_state, load_state, open_bank, read_state, save_state
from tests.memory_bank.worlds import DIM, ROWS, World, assert_equal, miner, run


def saved(path, **policy):
    world = World()
    subject = miner(world, **policy)
    found = run(subject, world, 10)
    save_state(path, subject.state_dict())
    return world, subject, found


@pytest.mark.parametrize(
    "policy",
    [
        {"query": "stored", "lag": 2},
        {"backend": "faiss", "index": "IVF2,SQ8", "nprobe": 1, "min_fill": 0.85, "recall_every": 3},
    ],
)
def test_a_state_written_to_disk_is_the_run(tmp_path, policy):
    world, subject, _ = saved(tmp_path / "bank.safetensors", **policy)
    twin = miner(world, **policy)
    twin.load_state_dict(load_state(tmp_path / "bank.safetensors"))
    for one, two in zip(run(subject, world, 8, start=10), run(twin, world, 8, start=10), strict=True):
        assert_equal(one, two)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickled_code_damage_and_other_files_are_refused(tmp_path, capsys):
    path = tmp_path / "bank.safetensors"
    torch.save({"bank": Hostile()}, path)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_state(path)
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    assert "code ran" not in capsys.readouterr().out
    saved(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    save_state(path, {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="not the state of a bank"):
        load_state(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "none.safetensors")
    for plain in ("3", "{", '{"bank": 3}', "[" * 100_000):
        sealed.write(path, {"bank/key": torch.ones(1)}, {"state": plain})
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)


def test_one_altered_byte_of_a_bank_outside_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "bank.safetensors"
    saved(path)
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"a": {"b": {}, "x": torch.arange(3), "none": None}, "n": float("nan"), "l": [1, "2", None]}
    save_state(tmp_path / "bank.safetensors", state)
    found = read_state(tmp_path / "bank.safetensors")
    assert found["a"].keys() == {"b", "x", "none"}
    assert torch.equal(found["a"].pop("x"), torch.arange(3))
    assert found["a"] == {"b": {}, "none": None}
    assert found["n"] != found["n"]
    assert found["l"] == [1, "2", None]
    for wrong in ({"a": (1, 2)}, {1: 2}, {"a/b": 1}, {"a": [torch.ones(1)]}):
        with pytest.raises(TypeError):
            save_state(tmp_path / "bank.safetensors", wrong)


def test_a_bank_is_found_in_a_checkpoint_and_in_a_run(tmp_path):
    folder = tmp_path / "checkpoints" / "step-10"
    folder.mkdir(parents=True)
    _, subject, _ = saved(folder / "bank.safetensors")
    (tmp_path / "checkpoints" / "last").write_text("step-10\n")
    for path in (tmp_path, folder, folder / "bank.safetensors"):
        assert find_state(path) == folder / "bank.safetensors"
    bank = open_bank(load_state(folder / "bank.safetensors"))
    assert torch.equal(bank.key, subject.bank.key)
    with pytest.raises(ValueError, match="no bank here"):
        find_state(folder.parent)


def test_inspect_prints_what_the_bank_holds(tmp_path, capsys):
    world = World()
    subject = miner(world, query="stored")
    run(subject, world, 6)
    keys = subject.bank.key.float()
    held = subject.bank.id[subject.bank.id >= 0]
    subject.write(
        torch.stack([keys[held[0]], torch.full((8,), torch.nan)]), torch.stack([held[1], held[2]]), 6
    )
    save_state(tmp_path / "bank.safetensors", subject.state_dict())
    (tmp_path / "manifest.csv").write_text(
        "row,key,size\n" + "".join(f"{row},img/{row}.png,1\n" for row in range(ROWS))
    )
    assert main(["inspect", str(tmp_path / "bank.safetensors"), "--examples", "2", "--neighbours", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["rows"] == 72
    assert found["fill"] == 0.75
    assert found["refused"] == 1
    assert found["last_step"] == 6
    assert found["backend"] == "exact search of 96 rows on cpu (auto: 16384 rows or fewer)"
    assert found["dim"] == DIM
    assert found["age"]["q0"] == 0
    assert found["age"]["q100"] == 6
    assert found["norm"]["q50"] == pytest.approx(1, abs=1e-3)
    pair = {f"img/{int(held[0])}.png", f"img/{int(held[1])}.png"}
    assert [{entry["a"], entry["b"]} for entry in found["duplicates"]["pairs"]] == [pair]
    assert found["duplicates"]["rows"] == 2
    assert len(found["neighbours"]) == 2
    for example in found["neighbours"]:
        similarities = [near["similarity"] for near in example["nearest"]]
        assert similarities == sorted(similarities, reverse=True)
        assert len(similarities) == 3
        assert example["row"] not in [near["row"] for near in example["nearest"]]
    assert any("img/" in line for line in lines[:-1])


def test_inspect_names_an_index_and_its_recall(tmp_path, capsys):
    index = {"backend": "faiss", "index": "IVF2,SQ8", "nprobe": 1, "min_fill": 0.85, "recall_every": 3}
    for steps, said in ((2, "not trained yet"), (10, "recall ")):
        world, subject = World(), miner(**index)
        run(subject, world, steps)
        save_state(tmp_path / "bank.safetensors", subject.state_dict())
        assert main(["inspect", str(tmp_path)]) == 0
        backend = json.loads(capsys.readouterr().out.splitlines()[-1])["backend"]
        assert backend.startswith("FAISS IVF2,SQ8 index of 96 rows on the CPU, nprobe")
        assert said in backend


@pytest.mark.parametrize(
    ("option", "value"),
    [("examples", "-1"), ("neighbours", "-3"), ("duplicates", "nan"), ("duplicates", "inf")],
)
def test_inspect_says_which_option_is_out_of_its_range(tmp_path, capsys, option, value):
    save_state(tmp_path / "bank.safetensors", miner().state_dict())
    assert main(["inspect", str(tmp_path), f"--{option}", value]) == 2
    assert f"{option}={value}: allowed is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("bank/key", "a string"),
        ("bank/key", None),
        ("bank/key", torch.ones(4, 2, dtype=torch.int64)),
        ("bank/id", [1, 2]),
        ("bank/id", torch.zeros(3)),
        ("bank/written_at", torch.zeros(3, dtype=torch.int64)),
        ("bank/refused", None),
        ("bank/kind", ["dataset"]),
        ("bank/kind", "queue"),  # without its head
        ("issued", 3),
        ("retrieval", "recall"),
        ("retrieval/recall", "high"),
        ("backend", 3),
    ],
)
def test_inspect_names_the_altered_entry(tmp_path, capsys, place, value):
    state = miner().state_dict()
    *folder, name = place.split("/")
    (state[folder[0]] if folder else state)[name] = value
    save_state(tmp_path / "bank.safetensors", state)
    assert main(["inspect", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    told = "bank/head" if value == "queue" else place.removeprefix("retrieval/")
    assert (out, f"not the state of a bank: {told} is" in err or f", {told} " in err) == ("", True)


def test_inspect_counts_keys_that_are_no_numbers_and_leaves_them_out(tmp_path, capsys):
    """NaN, infinity and what overflows when multiplied: the last line is JSON, which has none of them."""
    world, subject = World(), miner()
    run(subject, world, 3)
    state = subject.state_dict()
    key = state["bank"]["key"] = state["bank"]["key"].float()
    held = torch.nonzero(state["bank"]["id"] >= 0)[:, 0]
    key[held[0]], key[held[1]], key[held[2]] = torch.nan, torch.inf, 1e30
    save_state(tmp_path / "bank.safetensors", state)

    def no_constant(name):
        raise AssertionError(name)

    assert main(["inspect", str(tmp_path), "--examples", "99", "--neighbours", "99"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=no_constant)
    assert (found["rows"], found["not_finite"]) == (len(held), 3)
    assert found["norm"]["q100"] == pytest.approx(1, abs=1e-3)
    shown = {example["row"] for example in found["neighbours"]}
    near = {each["row"] for example in found["neighbours"] for each in example["nearest"]}
    assert shown == near == {f"row {int(state['bank']['id'][slot])}" for slot in held[3:]}

    key[:] = torch.nan
    save_state(tmp_path / "bank.safetensors", state)
    assert main(["inspect", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=no_constant)
    assert (found["norm"], found["neighbours"], found["duplicates"]["rows"]) == (None, [], 0)


def test_inspect_of_an_empty_bank_and_of_none(tmp_path, capsys):
    save_state(tmp_path / "bank.safetensors", miner().state_dict())
    assert main(["inspect", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 0
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "give a run directory" in capsys.readouterr().err
    (tmp_path / "manifest.csv").write_text("a,b\n1,2\n")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "columns row and key" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["../../elsewhere", "/etc", "step-10/../../../elsewhere", "step-11", ""])
def test_a_pointer_is_followed_to_a_checkpoint_beside_it_only(tmp_path, text):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "checkpoints" / "step-10", elsewhere):
        folder.mkdir(parents=True)
        (folder / "bank.safetensors").write_bytes(b"")
    (run / "checkpoints" / "step-11").symlink_to(elsewhere)
    (run / "checkpoints" / "last").write_text(text)
    with pytest.raises(ValueError, match="only a checkpoint beside it is followed"):
        find_state(run)

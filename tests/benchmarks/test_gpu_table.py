"""The table of a GPU on a machine whose clock is moved by the seconds that each command is given."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CONTEXT = {"device": "abacus", "commit": "c" * 40, "versions": {"torch": "2"}}
SLICE = 330.0  # 300 to measure in: 30 are kept for saving


class Machine:
    """Lines that take the given seconds; one that resumes keeps what it has done.

    Attributes:
        now: Its clock.
        ran: Names of the lines, once for each start.
    """

    def __init__(self, load: Any, folder: Path, **takes: float) -> None:
        self.module = load("gpu_table")
        self.now, self.takes, self.ran, self.done = 0.0, takes, list[str](), dict[str, float]()
        self.broken: set[str] = set()
        self.resuming = {name for name in takes if name.startswith("run")}
        self.table = self.module.Table(
            folder / "out", folder / "work", lambda: CONTEXT, self.execute, lambda: self.now
        )

    def rows(self, **estimates: float) -> list[Any]:
        return [
            self.module.Row(
                name, ((name,),), lambda found: {"value": found[0]["value"]}, seconds, name in self.resuming
            )
            for name, seconds in estimates.items()
        ]

    def execute(self, command: tuple[str, ...], work: Path, end: float) -> dict[str, Any]:
        (name,) = command
        self.ran.append(name)
        if name in self.broken:
            raise self.module.Failed("exit code 1: no such thing | as this")
        left = self.takes[name] - self.done.get(name, 0.0)
        if left > end - self.now:
            self.done[name] = self.done.get(name, 0.0) + (end - self.now) * (name in self.resuming)
            self.now = end
            raise self.module.Stopped
        self.now += left
        return {"value": len(name), "peak_memory_mib": 1234}

    def call(self, rows: list[Any], seconds: float = SLICE) -> list[str]:
        """Run the command once; return the lines that it started."""
        self.ran.clear()
        began = self.now
        self.table.fill(rows, seconds)
        assert self.now - began <= seconds
        return list(self.ran)


def test_lines_are_measured_once_in_their_order_with_their_context(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, b=10, a=10, c=10)
    rows = machine.rows(b=10, a=10, c=10)
    assert machine.call(rows, float("inf")) == ["b", "a", "c"]
    assert machine.call(rows, float("inf")) == []
    written = json.loads((tmp_path / "out" / "a.json").read_text())
    assert written["figures"] == {"value": 1}
    assert written["peak_memory_mib"] == 1234
    assert written["results"] == [{"value": 1, "peak_memory_mib": 1234}]
    assert {name: written[name] for name in CONTEXT} == CONTEXT
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert lines[2:5] == [f"| {name} | value 1 | 1,234 |" for name in "bac"]
    assert lines[6] == "abacus, torch 2, commit `ccccccc`."


def test_a_line_that_does_not_fit_makes_room_for_a_less_valuable_one(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, a=150, b=200, c=100)
    rows = machine.rows(a=150, b=200, c=100)
    assert machine.call(rows) == ["a", "c"]
    assert machine.call(rows) == ["b"]
    assert machine.call(rows) == []


def test_a_long_run_spans_slices_and_lets_nothing_overtake_it(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, a=200, run=650, b=40)
    rows = machine.rows(a=200, run=600, b=40)
    assert [machine.call(rows) for _ in range(4)] == [["a", "run"], ["run"], ["run", "b"], []]


def test_a_run_is_not_started_for_less_time_than_its_start_costs(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, a=220, run=100, b=20)
    assert machine.call(machine.rows(a=220, run=100, b=20)) == ["a", "b"]


def test_a_line_that_took_longer_than_estimated_gets_more_time(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(load, tmp_path, a=200, b=250, c=900)
    rows = machine.rows(a=200, b=50, c=50)
    assert machine.call(rows) == ["a", "b"]
    assert machine.call(rows) == ["b", "c"]
    assert machine.call(rows) == ["c"]
    assert machine.call(rows) == []  # a whole slice was too short
    assert "c: 300 s are left, 301 s are needed; left to --slice 332" in capsys.readouterr().err
    assert machine.call(rows, 1000) == ["c"]


def test_a_line_that_failed_is_shown_and_not_repeated_until_its_file_is_deleted(
    load: Any, tmp_path: Path
) -> None:
    machine = Machine(load, tmp_path, a=10, b=10)
    machine.broken = {"a"}
    rows = machine.rows(a=10, b=10)
    assert machine.call(rows) == ["a", "b"]
    table = (tmp_path / "out" / "README.md").read_text()
    assert "| a | **failed**, exit code 1: no such thing / as this | - |" in table
    machine.broken = set()
    assert machine.call(rows) == []
    (tmp_path / "out" / "a.json").unlink()
    assert machine.call(rows) == ["a"]
    assert "failed" not in (tmp_path / "out" / "README.md").read_text()


def test_a_line_whose_commands_are_not_done_is_missing(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, run=10)
    row = machine.module.Row("run", (("run",),), lambda found: None, 10, True)
    assert machine.table.fill([row], SLICE) == [row]


def test_lines_of_recipes_that_are_gone_stay_below(load: Any, tmp_path: Path) -> None:
    machine = Machine(load, tmp_path, old=10, b=10)
    machine.call(machine.rows(old=10, b=10))
    assert [one["row"] for one in machine.table.lines(machine.rows(b=10))] == ["b", "old"]


@pytest.fixture
def run(load: Any, tmp_path: Path) -> Any:
    """Run a Python program as a command of a line, until some seconds from now."""
    execute = load("gpu_table").execute

    def ran(code: str, seconds: float = float("inf")) -> Any:
        return execute(("-c", code), tmp_path, time.monotonic() + seconds)

    return ran


def test_the_result_is_the_last_line_or_a_file(run: Any, tmp_path: Path) -> None:
    assert run("print('hello'); print('{\"a\": 1}')") == {"a": 1}
    assert run("pass") == {}
    (tmp_path / "result.json").write_text('{"b": 2}')
    assert run("print('written')") == {"b": 2}


def test_a_command_is_told_its_folder_and_the_seconds_left(load: Any, tmp_path: Path) -> None:
    command = ("-c", "import sys, json; print(json.dumps(sys.argv[1:]))", "{work}/x", "{left}")
    work, left = load("gpu_table").execute(command, tmp_path, float("inf"))
    assert (work, left) == (f"{tmp_path}/x", "inf")


def test_exit_codes(load: Any, run: Any) -> None:
    table = load("gpu_table")
    with pytest.raises(table.Stopped):
        run("raise SystemExit(75)")
    with pytest.raises(table.Failed, match="exit code 1: it broke"):
        run("raise SystemExit('it broke')")


def test_a_command_that_is_not_done_in_time_is_stopped(load: Any, run: Any, tmp_path: Path) -> None:
    with pytest.raises(load("gpu_table").Stopped):
        run("import time; time.sleep(600)", seconds=0)


def test_stopping_lets_a_command_save_and_ends_what_it_started(load: Any, tmp_path: Path) -> None:
    program = """
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def save(*_):
    pathlib.Path("saved").write_text("all")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        load("gpu_table").stop(process)
    assert process.returncode == 75
    assert (tmp_path / "saved").read_text() == "all"
    for _ in range(600):  # until the system has cleared it away
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            os.kill(child, 0)
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still running")


def test_the_copy_replaces_what_is_between_the_markers(load: Any, tmp_path: Path) -> None:
    module, document = load("gpu_table"), tmp_path / "README.md"
    document.write_text(f"above\n{module.START}\nold\n{module.END}\nbelow\n")
    module.copy_between_markers(document, "| new |\n")
    module.copy_between_markers(document, "| newer |\n")
    assert document.read_text() == f"above\n{module.START}\n| newer |\n{module.END}\nbelow\n"
    document.write_text(f"{module.END}\n{module.START}\n")
    with pytest.raises(SystemExit, match="needs <!-- gpu-table -->"):
        module.copy_between_markers(document, "| new |\n")


def test_the_readme_has_the_markers(load: Any) -> None:
    module, text = load("gpu_table"), (Path(__file__).parents[2] / "README.md").read_text()
    assert -1 < text.find(module.START) < text.find(module.END)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "are no results of a GPU"),
        (
            ["--device", "cpu", "--tiny", "--out", "x", "--only", "smoke-none"],
            "--only smoke-none: allowed are smoke-",
        ),
    ],
)
def test_wrong_arguments(
    load: Any,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        load("gpu_table").main()
    assert message in capsys.readouterr().err


def test_the_command_line_lists_and_measures(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("gpu_table")
    row = module.Row("one", (("-c", "print('{\"a\": 5}')"),), lambda found: found[0], 10)
    monkeypatch.setattr(module, "all_rows", lambda *_: [row])
    common = [
        "gpu_table.py",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", [*common, "--list"])
    assert module.main() == 0
    assert capsys.readouterr().out == "missing  one\n"
    monkeypatch.setattr(sys, "argv", [*common, "--slice", "35"])
    assert module.main() == 75  # 5 seconds are too few
    monkeypatch.setattr(sys, "argv", common)
    assert module.main() == 0
    assert "| one | a 5 | - |" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*common, "--list"])
    module.main()
    assert capsys.readouterr().out == "done     one\n"

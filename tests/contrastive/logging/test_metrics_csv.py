"""metrics.csv after kills, resumes and full disks."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contrastive.logging import metrics_csv


@pytest.fixture
def log() -> Any:
    return metrics_csv


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_columns_and_precision(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    values = {"train/loss": 0.1 + 0.2, "train/tiny": 5e-324, "mining/none": math.nan, "train/big": math.inf}
    logger.log_metrics(values | {"epoch": 0.0}, step=10)
    logger.log_metrics({"train/loss": float(torch.tensor(1 / 3)), "epoch": 1.5}, step=20)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,seconds,train/loss,train/tiny,mining/none,train/big"
    first, second = rows(tmp_path)
    assert {name: first[name] for name in ("step", "epoch")} == {"step": "10", "epoch": "0"}
    assert second["epoch"] == "1.5"
    assert float(first["train/loss"]) == 0.30000000000000004
    assert float(first["train/tiny"]) == 5e-324
    assert first["mining/none"] == "nan"
    assert first["train/big"] == "inf"
    assert second["train/tiny"] == ""
    read = log.read_metrics(tmp_path / "metrics.csv")
    assert read["step"] == [10.0, 20.0]
    assert read["train/loss"] == [0.30000000000000004, float(torch.tensor(1 / 3))]
    assert math.isnan(read["train/tiny"][1])


def test_calls_of_one_step_share_a_row_and_the_last_value_wins(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"a": 1.123456789, "b": 100.0 + step}, step=step)
        logger.log_metrics({"a": 7.0}, step=step)  # shorter than what it replaces
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("1", "7.0", "101.0"),
        ("2", "7.0", "102.0"),
    ]


def test_new_names_widen_the_table_in_order_of_appearance(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    logger.log_metrics({"b": 1.0}, step=1)
    logger.log_metrics({"b": 2.0, "z": 3.0}, step=2)
    logger.log_metrics({"a": 4.0}, step=2)
    logger.log_metrics({"a": 5.0, "b": 6.0}, step=3)
    table = rows(tmp_path)
    assert list(table[0])[3:] == ["b", "z", "a"]
    assert [[row["b"], row["z"], row["a"]] for row in table] == [
        ["1.0", "", ""],
        ["2.0", "3.0", "4.0"],
        ["6.0", "", "5.0"],
    ]


def test_a_late_metric_goes_to_its_own_row(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    for step in (1, 3):
        logger.log_metrics({"a": float(step)}, step=step)
    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"a": 9.0}, step=1)
    logger.log_metrics({"a": 4.0}, step=4)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [
        ("1", "9.0"),
        ("2", "2.0"),
        ("3", "3.0"),
        ("4", "4.0"),
    ]


def test_every_row_is_on_its_way_to_the_disk_at_once(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    for step in range(1, 6):
        logger.log_metrics({"a": 1.0}, step=step)
        assert len(rows(tmp_path)) == step
        assert (tmp_path / "metrics.csv").read_bytes().endswith(b"\n")


def test_cut_anywhere_and_rewound_it_ends_like_an_uninterrupted_run(log: Any, tmp_path: Path) -> None:
    def write(directory: Path, steps: range) -> None:
        logger = log.MetricsCsv(directory)
        logger.rewind(steps[0] - 1)
        for step in steps:
            logger.log_metrics({"a": step / 3} | ({"b": step / 7} if step > 4 else {}), step=step)

    def without_seconds(directory: Path) -> list[dict[str, str]]:
        return [row | {"seconds": ""} for row in rows(directory)]

    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", range(1, 9))
    content = (tmp_path / "whole" / "metrics.csv").read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content) + 1, 3):
        (tmp_path / "half" / "metrics.csv").write_bytes(content[:cut])
        whole_rows = content[:cut].count(b"\n") - 1
        write(tmp_path / "half", range(min(whole_rows, 6) + 1, 9))
        assert without_seconds(tmp_path / "half") == without_seconds(tmp_path / "whole")


def test_rewind_drops_later_rows_only(log: Any, tmp_path: Path) -> None:
    logger = log.MetricsCsv(tmp_path)
    logger.rewind(5)
    assert not (tmp_path / "metrics.csv").exists()
    for step in (2, 4, 6):
        logger.log_metrics({"a": float(step)}, step=step)
    log.MetricsCsv(tmp_path).rewind(4)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4"]
    log.MetricsCsv(tmp_path).rewind(0)
    assert rows(tmp_path) == []
    assert log.read_metrics(tmp_path / "metrics.csv") == {"step": [], "epoch": [], "seconds": [], "a": []}


def test_a_torn_line_is_not_read_and_not_appended_to(log: Any, tmp_path: Path) -> None:
    log.MetricsCsv(tmp_path).log_metrics({"a": 1.0}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0,1")
    assert log.read_metrics(tmp_path / "metrics.csv")["a"] == [1.0]
    log.MetricsCsv(tmp_path).log_metrics({"a": 2.0}, step=2)
    assert [row["a"] for row in rows(tmp_path)] == ["1.0", "2.0"]


def test_broken_lines_in_the_middle_are_dropped_aloud(log: Any, tmp_path: Path) -> None:
    log.MetricsCsv(tmp_path).log_metrics({"a": 1.0}, step=1)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"\0\0\0\0\n3,,1.0\n4,,0.5,word\n5,,2.0,3.0\n")
    with pytest.warns(UserWarning, match="3 unreadable lines"):
        log.MetricsCsv(tmp_path).log_metrics({"a": 6.0}, step=6)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [("1", "1.0"), ("5", "3.0"), ("6", "6.0")]


def test_seconds_accumulate_over_resumes(log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(log.time, "monotonic", lambda: clock.now)
    logger = log.MetricsCsv(tmp_path)
    clock.now += 5
    logger.log_metrics({"a": 1.0}, step=1)
    state = json.loads(json.dumps(logger.state_dict()))
    clock.now = 7.0  # another machine, another origin
    logger = log.MetricsCsv(tmp_path)
    clock.now += 30  # setting up is no training
    logger.load_state_dict(state)
    clock.now += 2.5
    logger.log_metrics({"a": 1.0}, step=2)
    assert log.read_metrics(tmp_path / "metrics.csv")["seconds"] == [5.0, 7.5]


def test_a_full_disk_is_reported_once_and_rows_go_on_later(log: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = log.MetricsCsv(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    size = (tmp_path / "metrics.csv").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))  # room for half a line
        with pytest.warns(UserWarning, match="rows are missing") as record:
            [logger.log_metrics({"a": 1.0}, step=step) for step in (2, 3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(record) == 1
    logger.log_metrics({"a": 4.0}, step=4)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [("1", "1.0"), ("4", "4.0")]


@pytest.mark.parametrize("name", ["a,b", "a\nb", 'a"b', ""])
def test_names_a_header_cannot_hold(log: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="metric name"):
        log.MetricsCsv(tmp_path).log_metrics({name: 1.0}, step=1)
    with pytest.raises(ValueError, match="step=None"):
        log.MetricsCsv(tmp_path).log_metrics({"a": 1.0})


def test_other_files_are_refused(log: Any, tmp_path: Path) -> None:
    with pytest.raises(log.UserError, match="no such file"):
        log.read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("name,value\na,1\n")
    with pytest.raises(log.UserError, match=r"not a metrics\.csv"):
        log.read_metrics(tmp_path / "metrics.csv")

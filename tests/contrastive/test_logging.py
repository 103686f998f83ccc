"""metrics.csv after kills and resumes, W&B on line, off line and out of reach, throughput, progress bars."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice on tiny runs, and its own use of a deprecated torch function.
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


@pytest.fixture
def log() -> Any:
    from contrastive import logging

    return logging


@pytest.fixture(autouse=True)
def no_wandb_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without credentials; whatever W&B writes outside the run directory shows up in it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # build_wandb sets them for the whole process
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return home


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------- metrics.csv


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


# ----------------------------------------------------------------------------------------------- in training


class Loader:
    """Batches with ``images``, delivered after a pause."""

    def __init__(self, batches: int, pause_s: float = 0.0) -> None:
        self.batches, self.pause_s = batches, pause_s

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            time.sleep(self.pause_s)
            yield {"images": torch.ones(4, 3)}


def fit(tmp_path: Path, loggers: Any, callbacks: list[Any], loader: Loader, **options: Any) -> Any:
    from pytorch_lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(options_step_s)
            loss: torch.Tensor = self.net(batch["images"]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    options_step_s = options.pop("step_s", 0.0)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=loggers,
        callbacks=callbacks,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 1, "log_every_n_steps": 2, "enable_progress_bar": False} | options,
    )
    trainer.fit(Module(), loader)
    return trainer


def make_row_logger(log: Any) -> Any:
    from pytorch_lightning import Callback

    class Rows(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = {"train/half": trainer.global_step / 2, "train/step": torch.tensor(trainer.global_step)}
            if trainer.global_step > 0 and trainer.global_step % log.log_interval(trainer) == 0:
                log.log_row(trainer, metrics)

    return Rows()


def test_throughput_and_rows_of_a_real_run(log: Any, tmp_path: Path) -> None:
    from pytorch_lightning import Callback

    class Slow(Callback):
        """Half of it is training, half is not."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            time.sleep(0.04)
            with log.off_the_clock(trainer):
                time.sleep(0.1)

    meter = log.Throughput(images=lambda batch: len(batch["images"]))
    logger = log.MetricsCsv(tmp_path)
    trainer = fit(
        tmp_path,
        [logger],
        [Slow(), meter, make_row_logger(log)],
        Loader(16, pause_s=0.06),
        step_s=0.02,
        accumulate_grad_batches=2,
    )
    table = log.read_metrics(tmp_path / "metrics.csv")
    assert table["step"] == [2.0, 4.0, 6.0, 8.0]
    assert table["train/half"] == [1.0, 2.0, 3.0, 4.0]
    assert table["train/step"] == table["step"]
    # A micro-batch takes 60 ms of waiting and 60 ms of work, a step two of them; the machine may be busy.
    for wait, step_ms, rate in zip(
        table["perf/data_wait"], table["perf/step_ms"], table["perf/images_per_s"], strict=True
    ):
        assert 0.3 < wait < 0.6
        assert 240 <= step_ms < 400  # with what was off the clock it would be 440
        assert rate == pytest.approx(8 / step_ms * 1000)
    assert "start" not in vars(trainer.profiler)


def test_log_row_fetches_tensors_and_keeps_precision(log: Any) -> None:
    from pytorch_lightning import Trainer

    sent: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: sent.append((values, step)))
    trainer = create_autospec(Trainer, instance=True)
    trainer.loggers, trainer.is_global_zero, trainer.global_step = [logger, logger], True, 7
    metrics = {"b": torch.tensor(2**24 + 1), "a": 0.1, "c": torch.tensor(0.5, requires_grad=True)}
    log.log_row(trainer, metrics)
    assert sent == [({"b": 16777217.0, "a": 0.1, "c": 0.5}, 7)] * 2
    assert list(sent[0][0]) == ["b", "a", "c"]
    trainer.is_global_zero = False
    log.log_row(trainer, metrics)
    assert len(sent) == 2


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_bars_leave_stdout_alone(
    log: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    with_rich: bool,
) -> None:
    if not with_rich:
        find = log.importlib.util.find_spec
        monkeypatch.setattr(
            log.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
        )
    bar = log.progress_bar(True)
    assert type(bar).__mro__[1].__name__ == ("RichProgressBar" if with_rich else "TQDMProgressBar")
    fit(tmp_path, False, [bar], Loader(3), enable_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("Pretraining" if with_rich else "Epoch 0") in err
    assert log.progress_bar(False) is None


# ------------------------------------------------------------------------------------------------------- W&B


def config(log: Any, mode: str) -> Any:
    return log.WandbConfig(mode=mode, project="test", tags=["one"])


def build(log: Any, tmp_path: Path, mode: str, run_id: str | None = None) -> Any:
    return log.build_wandb(config(log, mode), tmp_path / "run", "name", run_id, {"data": {"name": "digits"}})


def test_auto_without_credentials_is_off_and_says_how_to_change_it(
    log: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(log, tmp_path, "auto") is None
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "not logged in" in err
    assert "logging.wandb.mode=offline" in err
    assert build(log, tmp_path, "disabled") is None
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "content", "environment"),
    [
        (None, "", {"WANDB_API_KEY": "k" * 40}),
        (None, "", {"WANDB_IDENTITY_TOKEN_FILE": "token"}),
        (".netrc", "machine api.wandb.ai login user password key\n", {}),
        ("own", "machine api.wandb.ai login user password key\n", {"NETRC": "own"}),
        (".netrc", "machine wandb.here login user password key\n", {"WANDB_BASE_URL": "https://wandb.here"}),
        (".config/wandb/settings", "[default]\napi_key = k\n", {}),
    ],
)
def test_auto_with_credentials_is_online(
    log: Any,
    no_wandb_of_the_user: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str | None,
    content: str,
    environment: dict[str, str],
) -> None:
    assert log._wandb_mode("auto") == "disabled"
    if place is not None:
        path = no_wandb_of_the_user / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(no_wandb_of_the_user / value) if name == "NETRC" else value)
    assert log._wandb_mode("auto") == "online"
    assert log._wandb_mode("online") == "online"
    assert log._wandb_mode("offline") == "offline"


@pytest.mark.parametrize(
    ("content", "environment"),
    [
        ("machine example.org login user password key\n", {}),
        ("machine api.wandb.ai login user password key\n", {"WANDB_BASE_URL": "https://wandb.here"}),
        ("nonsense {", {}),
    ],
)
def test_credentials_for_another_server_do_not_count(
    log: Any,
    no_wandb_of_the_user: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    environment: dict[str, str],
) -> None:
    (no_wandb_of_the_user / ".netrc").write_text(content)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert log._wandb_mode("auto") == "disabled"
    with pytest.raises(log.UserError, match="not logged in, run 'wandb login'"):
        log._wandb_mode("online")


@pytest.mark.parametrize(
    ("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
def test_auto_follows_the_environment(
    log: Any, monkeypatch: pytest.MonkeyPatch, value: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    assert log._wandb_mode("auto") == mode


def test_without_the_package(
    log: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = log.importlib.util.find_spec
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert log._wandb_mode("auto") == "disabled"
    assert "pip install wandb" in capsys.readouterr().err
    for mode in ("online", "offline"):
        with pytest.raises(log.UserError, match="pip install wandb"):
            log._wandb_mode(mode)
    assert log._wandb_mode("disabled") == "disabled"


@pytest.fixture
def wandb_ends() -> Iterator[None]:
    """W&B's service process ends with the test."""
    yield
    import wandb

    wandb.teardown()


def train_with_wandb(log: Any, tmp_path: Path, mode: str) -> Any:
    logger = build(log, tmp_path, mode, "abc123")
    fit(tmp_path, [logger], [make_row_logger(log)], Loader(4), log_every_n_steps=1)
    logger.experiment.finish()
    return logger


def inspect(path: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Records by type, and the summary, of an offline run, by W&B's own reader."""
    tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    lines, summary = (
        subprocess.run(
            [*tool, *options, str(path)], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        for options in ([], ["--summary"])
    )
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, lines.splitlines()):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records, json.loads(summary)


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_an_offline_run_is_complete_and_stays_in_its_directory(
    log: Any, tmp_path: Path, no_wandb_of_the_user: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = train_with_wandb(log, tmp_path, "offline")
    assert capfd.readouterr().out == ""
    assert logger.version == "abc123"
    assert list(no_wandb_of_the_user.rglob("*wandb*")) == []
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*-abc123")
    records, summary = inspect(path)
    history = [record["item"] for record in records["history"]]
    assert [row["trainer/global_step"] for row in history] == [1, 2, 3, 4]
    assert [row["train/half"] for row in history] == [0.5, 1, 1.5, 2]
    axes = {
        metric["glob_name"]: metric["step_metric"] for metric in records["metric"] if "glob_name" in metric
    }
    groups = ("train", "mining", "bank", "views", "probe", "knn", "stats", "perf", "data", "system")
    assert axes == {f"{group}/*": "trainer/global_step" for group in groups}
    assert summary["config"]["data"] == {"name": "digits"}
    assert (summary["name"], summary["project"], summary["tags"]) == ("name", "test", ["one"])
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_an_unreachable_server_does_not_stop_training(
    log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(log, "_INIT_TIMEOUT_S", 1.0)
    train_with_wandb(log, tmp_path, "online")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("W&B cannot be reached") == 1
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*-abc123")
    records, _ = inspect(path)
    assert [record["item"]["train/half"] for record in records["history"]] == [0.5, 1, 1.5, 2]

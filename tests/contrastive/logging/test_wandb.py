"""W&B on line, off line and out of reach."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from contrastive.logging.wandb_logger import RunLogger, build_wandb, finish_wandb, log_media
from tests.contrastive.logging.harness import Loader, fit, make_row_logger, read_records, read_summary

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice on tiny runs, and its own use of a deprecated torch function.
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


@pytest.fixture
def log() -> Any:
    from contrastive.logging import wandb_run

    return wandb_run


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


def config(log: Any, mode: str) -> Any:
    return log.WandbConfig(mode=mode, project="test", tags=["one"])


def build(log: Any, tmp_path: Path, mode: str, run_id: str = "abc123") -> Any:
    return build_wandb(config(log, mode), tmp_path / "run", "name", run_id, {"data": {"name": "digits"}})


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


def train_with_wandb(log: Any, tmp_path: Path, mode: str) -> Any:
    logger = build(log, tmp_path, mode)
    fit(tmp_path, [logger], [make_row_logger()], Loader(4), log_every_n_steps=1)
    logger.experiment.finish()
    return logger


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
    records, summary = read_records(path), read_summary(path)
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
    for name, value in {"MAX": "1", "WAIT_MIN_SECONDS": "0.1", "WAIT_MAX_SECONDS": "0.1"}.items():
        monkeypatch.setenv(f"WANDB__GRAPHQL_RETRY_{name}", value)
    monkeypatch.setattr(log, "_INIT_TIMEOUT_S", 1.0)
    train_with_wandb(log, tmp_path, "online")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("W&B cannot be reached") == 1
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*-abc123")
    records = read_records(path)
    assert [record["item"]["train/half"] for record in records["history"]] == [0.5, 1, 1.5, 2]


def test_only_a_server_is_given_up_on_soon(
    log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, W&B's own process answers, which may take long on a busy machine."""
    import wandb

    waits = []

    def init(mode: str, settings: Any, **_: Any) -> None:
        waits.append((mode, settings.init_timeout))
        if mode == "online":
            raise wandb.errors.CommError("gone")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    for mode in ("online", "offline"):
        log._start_wandb(mode, False, dir=str(tmp_path))
    usual_s = wandb.Settings().init_timeout
    assert waits == [("online", log._INIT_TIMEOUT_S), ("offline", usual_s), ("offline", usual_s)]
    assert capsys.readouterr().err.count("W&B cannot be reached (gone)") == 1


def test_a_run_whose_service_was_killed_is_told_of_once(
    log: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B's client raises what it raised when its process was killed while a run was logging."""
    from contrastive.logging.wandb_logger import RunLogger, alert, finish_wandb, log_media, wandb_run

    calls = []

    class Gone:
        id = "abc123"

        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any, **__: Any) -> None:
                calls.append(name)
                raise ConnectionResetError("Connection lost")

            return fail

    logger = RunLogger(save_dir=tmp_path, experiment=Gone())
    assert wandb_run([logger]) is not None
    trainer = fit(tmp_path, [logger], [make_row_logger()], Loader(4), log_every_n_steps=1)
    assert trainer.global_step == 4
    assert wandb_run([logger]) is None
    log_media(trainer, {"views/grid": None})
    alert(trainer, "collapse", "text")
    finish_wandb([logger], {}, None, 0)
    assert calls == ["log"]
    assert capsys.readouterr().err.count("every row from step 1 on is missing (Connection lost)") == 1


@pytest.mark.parametrize(
    ("code", "calls"), [(0, ["finish"]), (3, ["finish"]), (75, ["mark_preempting", "finish"])]
)
def test_a_run_ends_as_the_command_ends(tmp_path: Path, code: int, calls: list[str]) -> None:
    run = MagicMock(id="abc123")
    finish_wandb(
        [RunLogger(save_dir=tmp_path, experiment=run)], {"steps": 7, "metrics": {"a": 1}}, None, code
    )
    assert [name for name, *_ in run.method_calls if not name.startswith(("summary", "define"))] == calls
    run.finish.assert_called_once_with(code)
    run.summary.update.assert_called_once_with({"steps": 7})


def test_steps_that_a_killed_start_has_sent_are_not_sent_again(tmp_path: Path) -> None:
    from pytorch_lightning import Trainer

    sent: list[dict[str, Any]] = []

    def start(run_id: str = "abc123") -> RunLogger:
        run = MagicMock(id=run_id, log=lambda row, **_: sent.append(row))
        return RunLogger(save_dir=tmp_path, experiment=run)

    def media(logger: RunLogger, step: int) -> None:
        log_media(MagicMock(spec=Trainer, loggers=[logger], global_step=step), {"bank/map": step})

    def values(name: str) -> list[float]:
        return [row[name] for row in sent if name in row]

    killed = start()
    for step in (1, 2, 3):
        killed.log_metrics({"train/loss": float(step)}, step)
    media(killed, 3)

    resumed = start()  # from a checkpoint of step 1
    for step in (2, 3, 4):
        resumed.log_metrics({"train/loss": float(step)}, step)
        resumed.log_metrics({"knn/top1": float(step)}, step)  # of step 3 the kill came before
        media(resumed, step)
    assert values("train/loss") == [1, 2, 3, 4]
    assert values("knn/top1") == [3, 4]
    assert values("bank/map") == [3, 4]

    start("another").log_metrics({"train/loss": 1.0}, 1)
    assert values("train/loss") == [1, 2, 3, 4, 1]
    resumed.log_metrics({"train/loss": 5.0}, 5)
    finish_wandb([resumed], {"steps": 5}, None, 3)
    start().log_metrics({"train/loss": 3.0}, 3)  # with other settings, after it diverged
    assert values("train/loss") == [1, 2, 3, 4, 1, 5, 3]


def test_a_damaged_note_of_what_was_sent_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    for text in ("", "[]", '{"id": "abc123"}', "\x00"):
        (tmp_path / "wandb/sent.json").write_text(text)
        assert RunLogger(save_dir=tmp_path, experiment=MagicMock(id="abc123")).unsent({"a": 1}, 1) == {"a": 1}

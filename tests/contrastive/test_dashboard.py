import json
from pathlib import Path

import pytest

from contrastive.config import PretrainConfig
from contrastive.logging.names import GROUPS, MEDIA, METRICS, describe

# wandb-workspaces' own use of deprecated parts of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")

WORKSPACE = Path(__file__).parent / "workspace.json"
"""Made by ``contrastive-dashboard --entity acme --project vision --json | python -m json.tool``."""


@pytest.fixture
def dashboard():
    from contrastive import dashboard

    return dashboard


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_workspace_is_the_one_that_was_looked_at(dashboard, capsys):
    assert dashboard.main(["--entity", "acme", "--project=vision", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(WORKSPACE.read_text())


def test_every_panel_shows_something_that_is_logged(dashboard):
    """Names are documented ones, each picture and table has a panel, settings exist."""
    lines = [name for plots in dashboard.LINES.values() for names in plots.values() for name in names]
    shown = {each for name in lines for each in dashboard.spelt_out(name)}
    assert {name for name in shown if name not in METRICS and not describe(name)} == set()
    assert {name.partition("/")[0] for name in shown} == GROUPS.keys()
    assert {name for names in dashboard.MEDIA.values() for name in names} == MEDIA.keys()
    assert {name for name in dashboard.COMPARED["results"] if name not in METRICS} == set()
    for setting in dashboard.COMPARED["settings"]:
        value = PretrainConfig()
        for name in setting.split("."):
            value = getattr(value, name)
    text = WORKSPACE.read_text()
    assert {name for name in shown | MEDIA.keys() if f'"{name}"' not in text} == set()


def test_creating_it_reports_where_it_is(dashboard, monkeypatch, capsys):
    import wandb_workspaces.workspaces as ws

    saved = []
    monkeypatch.setattr(dashboard, "wandb_problem", lambda mode: None)
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(ws.Workspace, "url", "https://example.org/acme/vision")
    assert dashboard.main(["--entity", "acme", "--project", "vision", "--name", "ours"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"entity": "acme", "project": "vision", "name": "ours", "url": ws.Workspace.url}
    assert saved[0].name == "ours"

    def refused(self):
        raise ValueError("permission denied\nmore")

    monkeypatch.setattr(ws.Workspace, "save", refused)
    assert dashboard.main(["--entity", "acme", "--project", "vision"]) == 2
    assert "acme/vision (permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--entity is not given", "--entity E"]),
        (["--project", "vision", "--json"], ["--entity is not given", "--entity E"]),
        (["--entity", "acme", "--json"], ["--project is not given"]),
        (["--entity", "--json"], ["--entity: a value is needed"]),
        (["--entty", "acme"], ["'--entty': no such flag", "--entity"]),
        (["acme/vision"], ["'acme/vision': no such flag"]),
    ],
)
def test_wrong_input(dashboard, capsys, arguments, expected):
    assert dashboard.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    for part in expected:
        assert part in err


def test_without_account_or_package_it_says_what_to_do(dashboard, monkeypatch, capsys, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dashboard.main(["--entity", "acme", "--project", "vision"]) == 2
    assert "wandb login" in capsys.readouterr().err
    find = dashboard.importlib.util.find_spec
    monkeypatch.setattr(
        dashboard.importlib.util, "find_spec", lambda name: None if "workspaces" in name else find(name)
    )
    assert dashboard.main(["--entity", "acme", "--project", "vision", "--json"]) == 2
    assert "pip install 'contrastive-pretrain[dashboards]'" in capsys.readouterr().err

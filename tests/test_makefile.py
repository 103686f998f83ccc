"""Test what make says of commands that end early."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("interrupted", [True, False], ids=["by Ctrl-C", "alone"])
def test_an_interrupted_demo_is_no_error(tmp_path, interrupted):
    """A terminal sends Ctrl-C to make as well, which then ends by itself; else exit code 75 is an error."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\ntrap 'sleep 1; exit 75' INT\nkill -INT {0 if interrupted else '$$'}\nsleep 9\n"
    )
    program.chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "demo", f"VENV={tmp_path}"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=60, check=False
    )
    assert result.returncode == (-signal.SIGINT if interrupted else 2)
    assert ("Error 75" in result.stderr) == (not interrupted)
    assert "eval worth" not in result.stdout  # the next command is not run

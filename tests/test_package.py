"""The package as users get it: what a wheel holds, what is imported when, what may be missing."""

import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent

OPTIONAL = ("wandb", "sklearn", "matplotlib", "rich", "beartype", "timm")

BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {OPTIONAL!r}
        return None if missing else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import importlib.metadata
installed = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.replace("scikit-learn", "sklearn") in {OPTIONAL!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def python(code: str, cwd: Path, path: Path = ROOT, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "WANDB_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_help_and_wrong_input_answer_without_the_heavy_libraries(tmp_path):
    for package in (
        "contrastive",
        "contrastive.dashboard",
        "contrastive.export",
        "contrastive.shards",
        "eval",
    ):
        code = (
            "import sys, runpy\n"
            f"sys.argv = ['{package}', '--help']\n"
            "try:\n"
            f"    runpy.run_module('{package}', run_name='__main__')\n"
            "except SystemExit as stop:\n"
            "    assert not stop.code, stop.code\n"
            "heavy = {'torch', 'torchvision', 'kornia', 'faiss', 'pytorch_lightning', 'wandb', 'sklearn'}\n"
            "heavy |= {'numpy', 'onnx', 'wandb_workspaces'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        result = python(code, tmp_path)
        assert result.returncode == 0, result.stderr
        assert "usage: contrastive-" in result.stdout


def test_wrong_settings_of_own_are_refused_before_the_heavy_libraries(tmp_path):
    code = (
        "import sys\n"
        "from contrastive.__main__ import main\n"
        "for wrong in ('schedule.minutes=-1', 'method=none'):\n"
        "    assert main(['--config', 'own', 'data.root=.', wrong]) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "schedule.minutes=-1" in result.stderr
    assert "method='none'" in result.stderr


@pytest.mark.parametrize(
    "package", ["contrastive", "eval", "contrastive.export", "contrastive.dashboard", "contrastive.shards"]
)
def test_a_reader_that_has_left_is_no_error(tmp_path, package):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
        timeout=300,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "command",
    [
        "contrastive --help",
        "eval --help",
        "contrastive.export --help",
        "contrastive.dashboard --help",
        "memory_bank --help",
        "memory_bank inspect bank.safetensors",
    ],
)
def test_a_stdout_that_takes_nothing_is_named(tmp_path, command):
    """As that of a full disk; open for reading it takes nothing anywhere."""
    from memory_bank.state import save_state
    from tests.memory_bank.worlds import miner

    save_state(tmp_path / "bank.safetensors", miner().state_dict())
    with open(os.devnull) as unwritable:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()],
            stdout=unwritable,
            stderr=subprocess.PIPE,
            # Buffered, what could not be written must not fail once more when the process ends.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            cwd=tmp_path,
            text=True,
            check=False,
            timeout=300,
        )
    (said,) = done.stderr.splitlines()
    assert (done.returncode, "stdout cannot be written (Bad file descriptor)" in said) == (2, True)


def test_what_goes_to_a_closed_stderr_is_lost_and_no_more(monkeypatch):
    from contrastive.console import log_to_stderr

    monkeypatch.setattr(sys, "stderr", None)
    log_to_stderr()
    print("nowhere", file=sys.stderr)
    logging.getLogger("contrastive").info("nowhere")
    sys.stderr.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The tree's wheel, unpacked; built from a copy, so that nothing is left in the tree."""
    work = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).is_file():
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(work), str(work / "tree")], check=True, timeout=300)
    archive = zipfile.ZipFile(next(work.glob("*.whl")))
    archive.extractall(work / "site")
    return work / "site"


def test_the_wheel_holds_the_recipes_and_runs_outside_the_checkout(wheel, tmp_path):
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    held = {str(path.relative_to(wheel)) for path in (wheel / "configs").rglob("*.yaml")}
    assert shipped == held
    assert (wheel / "memory_bank" / "py.typed").is_file()
    assert not (wheel / "tests").exists()
    code = "import contrastive, contrastive.__main__ as cli; print(contrastive.__file__); cli.main()"
    result = python(code, tmp_path, wheel, "--print-config", "mining=hardest")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(wheel))
    assert "method: ranked" in result.stdout


def test_training_and_probing_need_none_of_the_optional_packages_and_what_does_says_which(tmp_path):
    """The run that users make on a cluster whose image holds the training stack alone, and one of digits."""
    tiny.write_classes(tmp_path / "photos", 24, names=("red", "green"), size=(16, 16))
    overrides = [
        "data.name=imagefolder",
        "data.root=photos",
        "data.image_size=16",
        "data.global_batch=8",
        "encoder.width=8",
        "schedule.epochs=2",
        "schedule.warmup_epochs=1",
        "run.name=bare",
        "trainer.accelerator=cpu",
    ]
    commands = """
from contrastive.__main__ import main as pretrain
from eval.__main__ import main as evaluate
codes = [pretrain(sys.argv[1:]), evaluate(["linear", "checkpoint=runs/bare"]), pretrain([])]
print(*codes)
"""
    result = python(BLOCK + commands, tmp_path, ROOT, *overrides)
    assert result.returncode == 0, result.stderr
    trained, probed, codes = result.stdout.splitlines()
    assert codes == "0 0 2"
    assert json.loads(trained)["finished"]
    assert json.loads(probed)
    assert (tmp_path / "runs/bare/eval/linear.json").is_file()
    assert "pip install scikit-learn" in result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bare"]

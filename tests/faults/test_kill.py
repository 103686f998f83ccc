"""Kill -9 at any step and in any save: the resumed run ends equal to the uninterrupted one, to the bit."""

import random
import shutil
import warnings

import pytest

from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.integrity import verify
from tests.faults.conftest import STEPS


def long(*values):
    return pytest.param(*values, marks=pytest.mark.faults)


def check_kills(lab, expected, kills, seed, *overrides, ranks=1):
    """Kill -9 ``kills`` runs at random steps, resume each, and compare what it ends with to the bit."""
    chance, resumed = random.Random(seed), 0
    for _ in range(kills):
        name = f"killed-{lab.count}"
        run_dir = lab.folder / "runs" / name
        # A single kill comes after the first checkpoint, so that there is one to resume from.
        step, delay_s = chance.randrange(0 if kills > 1 else 5, STEPS), chance.uniform(0, 0.04)
        ended = lab.kill_when("tell_step", step, name, *overrides, delay_s=delay_s, ranks=ranks)
        assert ended.codes == [-9] * ranks
        resumed += (run_dir / "checkpoints" / "last").exists()
        lab.finish(name, *overrides, ranks=ranks).assert_equals(expected)
        shutil.rmtree(run_dir)
    print(f"{kills} of {kills} ended equal, {resumed} of them from a checkpoint")  # pytest -rP shows it


@pytest.mark.parametrize(("workers", "kills"), [(0, 1), (2, 1), long(0, 20), long(2, 20)])
def test_kill_9_at_random_steps(lab, whole, workers, kills):
    reading = [f"data.num_workers={workers}", f"data.resident={'false' if workers else 'auto'}"]
    check_kills(lab, whole(), kills, workers, *reading)


@pytest.mark.parametrize(("workers", "kills"), [(0, 1), long(0, 10), long(2, 10)])
def test_kill_9_of_runs_on_clips(films, workers, kills):
    films.overrides += [f"data.num_workers={workers}", f"data.resident={'false' if workers else 'auto'}"]
    check_kills(films, films.finish("whole"), kills, 4 + workers)


@pytest.mark.parametrize("kills", [1, long(5)])
def test_kill_9_of_two_ranks(lab, whole, kills):
    check_kills(lab, whole(2), kills, 2, ranks=2)


@pytest.mark.parametrize("kills", [2, long(50)])
def test_kill_9_while_saving(lab, whole, kills):
    """A run is killed in its saves repeatedly; each start after a kill resumes from a complete checkpoint."""
    epochs = max(2, 2 * kills // 6 + 1)
    lab.overrides += [f"schedule.epochs={epochs}", "run.checkpoint_every=1", "run.keep_last=3"]
    expected = whole() if epochs == 2 else lab.finish("whole")
    chance = random.Random(3)
    checkpoints, reached = lab.folder / "runs" / "killed" / "checkpoints", -1
    for _ in range(kills):
        # A save takes about 10 ms here; the second of a process, so that there is progress.
        assert lab.kill_when("tell_save", 2, "killed", delay_s=chance.uniform(0, 0.015)).codes == [-9]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one that would have to be skipped
            newest = latest_valid(checkpoints)
        assert newest is not None
        assert verify(newest) > reached
        reached = verify(newest)
    lab.finish("killed").assert_equals(expected)

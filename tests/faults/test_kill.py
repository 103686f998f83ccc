"""Kill -9 at any step and in any save: the resumed run ends equal to the uninterrupted one, to the bit."""

import random
import warnings

import pytest

from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.integrity import verify
from tests.faults.conftest import STEPS


def long(*values):
    return pytest.param(*values, marks=pytest.mark.faults)


def kill_and_compare(lab, expected, kills, *, seed, ranks=1):
    chance = random.Random(seed)
    for trial in range(kills):
        name = f"killed-{trial}"
        # A single kill comes after the first checkpoint, so that there is one to resume from.
        step, delay_s = chance.randrange(0 if kills > 1 else 5, STEPS), chance.uniform(0, 0.04)
        assert lab.kill_when("tell_step", step, name, delay_s=delay_s, ranks=ranks).codes == [-9] * ranks
        lab.finish(name, ranks=ranks).assert_equals(expected)


@pytest.mark.parametrize(("workers", "kills"), [(0, 1), (2, 1), long(0, 20), long(2, 20)])
def test_kill_9_at_random_steps(lab, whole, workers, kills):
    lab.overrides += [f"data.num_workers={workers}", f"data.resident={'false' if workers else 'auto'}"]
    kill_and_compare(lab, whole(), kills, seed=workers)


@pytest.mark.parametrize(("workers", "kills"), [(0, 1), long(0, 10), long(2, 10)])
def test_kill_9_of_runs_on_clips(films, workers, kills):
    films.overrides += [f"data.num_workers={workers}", f"data.resident={'false' if workers else 'auto'}"]
    kill_and_compare(films, films.finish("whole"), kills, seed=4 + workers)


@pytest.mark.parametrize("kills", [1, long(5)])
def test_kill_9_of_two_ranks(lab, whole, kills):
    kill_and_compare(lab, whole(2), kills, seed=2, ranks=2)


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

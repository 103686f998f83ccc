import pytest

from tests import tiny
from tests.faults.harness import Lab, Zygote

EPOCHS, STEPS = 2, 12
"""Length of the runs that are killed, at 6 steps an epoch."""
OVERRIDES = [f"schedule.epochs={EPOCHS}", "run.checkpoint_every=4"]


@pytest.fixture(scope="session")
def zygote():
    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def lab(zygote, tmp_path):
    return Lab(zygote, tmp_path, list(OVERRIDES))


@pytest.fixture
def films(lab):
    """Write 48 videos in the place of the photos; return the lab, whose runs train on clips of them."""
    pytest.importorskip("av")
    (lab.folder / "photos").rename(lab.folder / "other")
    for number in range(48):
        tiny.write_video(lab.folder / "photos" / f"{number}.mp4", 6 + number % 5)
    lab.overrides += ["data.name=clips", "data.frames=4", "objective.own_negatives=shuffle"]
    lab.overrides += ["encoder.temporal=nuta", "encoder.temporal_args={dim: 8}"]
    return lab


class Whole:
    """Return the undisturbed run for a number of ranks; each is run once."""

    def __init__(self, lab):
        self._lab, self._made = lab, {}

    def __call__(self, ranks=1):
        if ranks not in self._made:
            self._made[ranks] = self._lab.finish(f"ranks-{ranks}", ranks=ranks)
            assert sorted(self._made[ranks].rows) == list(range(1, STEPS + 1))
        return self._made[ranks]

    def folder(self, ranks=1):
        """Return its run directory."""
        self(ranks)
        return self._lab.folder / "runs" / f"ranks-{ranks}"


@pytest.fixture(scope="session")
def whole(zygote, tmp_path_factory):
    return Whole(Lab(zygote, tmp_path_factory.mktemp("whole"), OVERRIDES))

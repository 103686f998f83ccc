"""Send a cluster's signals: the run saves after the optimizer step, exits with 75 and resumes exactly."""

import pytest

from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.integrity import verify
from tests.faults.harness import Ended


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_within_its_step(lab, whole, name):
    ended = lab.run("stopped", faults=[["signal_at", 5, name]])
    assert ended.codes == [75]
    assert f"stopped by {name} after saving" in ended.err[0]
    assert stopped_at(lab, ended) == 6
    lab.finish("stopped").assert_equals(whole())


def test_signal_to_one_rank_stops_both(lab, whole):
    ended = lab.run("stopped", ranks=2, faults={1: [["signal_at", 5, "SIGUSR1"]]})
    assert ended.codes == [75, 75]
    assert stopped_at(lab, ended) == 6
    lab.finish("stopped", ranks=2).assert_equals(whole(2))


def stopped_at(lab, ended: Ended) -> int:
    """Return the step of the newest checkpoint, which the command reports too."""
    newest = latest_valid(lab.folder / "runs" / "stopped" / "checkpoints")
    assert newest is not None
    assert ended.result["steps"] == verify(newest)
    return verify(newest)

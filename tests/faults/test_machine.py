"""Simulate faults of the machine: a full disk, no memory, a clock that is set back."""

import pytest

from contrastive.checkpoint.folder import latest_valid


def test_disk_full_while_saving_is_reported_once_and_loses_no_checkpoint(lab, whole):
    """No file may grow beyond 20 kB in steps 2 to 9, so the saves of steps 4 and 8 fail half way."""
    ended = lab.run("full", faults=[["limit_files", 20_000, 2, 9]])
    assert ended.codes == [0], ended.err
    assert ended.err[0].count("saving failed (File too large)") == 1
    assert sorted(path.name for path in (lab.folder / "runs/full/checkpoints").iterdir()) == [
        "last",
        "step-12",
    ]
    from tests.faults.harness import outcome

    outcome(lab.folder / "runs" / "full").assert_equals(whole())


def test_disk_that_stays_full_leaves_the_checkpoint_before(lab, whole):
    """The run cannot succeed, but continues from there once there is space."""
    ended = lab.run("full", faults=[["limit_files", 20_000, 6, 99]])
    assert ended.codes == [2]
    assert "cannot be written (File too large); free some space" in ended.err[0]
    assert "Traceback" not in ended.err[0]
    newest = latest_valid(lab.folder / "runs" / "full" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-4"
    lab.finish("full").assert_equals(whole())


def test_killed_decoding_process_is_named_and_the_run_goes_on_when_started_again(lab, whole):
    workers = ["data.resident=false", "data.num_workers=1"]
    ended = lab.run("memory", *workers, "schedule.epochs=2", faults=[["kill_workers_at", 6]])
    assert ended.codes == [1]
    assert "a decoding process was killed" in ended.err[0]
    assert "lower data.num_workers (now 1)" in ended.err[0]
    lab.finish("memory", *workers).assert_equals(whole())


@pytest.mark.faults
def test_clock_that_goes_backwards_changes_nothing(lab, whole):
    lab.run("back", "trainer.max_steps=6", faults=[["set_clock_back"]])
    found = lab.finish("back", faults=[["set_clock_back"]])
    found.assert_equals(whole())
    lines = (lab.folder / "runs" / "back" / "metrics.csv").read_text().splitlines()
    seconds = [float(line.split(",")[2]) for line in lines[1:]]
    assert seconds == sorted(seconds)

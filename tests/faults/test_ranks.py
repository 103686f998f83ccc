"""Check runs of several processes: the share of each rank, and their agreement."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from contrastive.data.plan import Plan
from tests.faults.conftest import STEPS
from tests.faults.harness import LIMIT_S, ROOT, TINY, as_ranks, load_bank, outcome
from tests.reference.equal import assert_same


def rows_by_step(path):
    lines = [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
    found = {}
    for step, *rows in lines:
        found.setdefault(step, []).extend(rows)
    return found


def test_two_one_two_ranks_across_resumes(lab, whole):
    """The same rows in every step, whatever the number of ranks; the bank holds all of them, equally old."""
    plan, notes = Plan(48, 0, 8, 2), lab.folder / "notes"
    for number, ranks in enumerate((2, 1, 2)):
        stop = () if number == 2 else (f"trainer.max_steps={4 * (number + 1)}",)
        faults = {
            rank: [["note_rows", f"{notes}-{number}-{rank}"], ["keep_bank", f"{lab.folder}/bank-{rank}.pt"]]
            for rank in range(ranks)
        }
        ended = lab.run("moving", *stop, ranks=ranks, faults=faults)
        assert ended.codes == [0] * ranks, ended.err
        shares = [rows_by_step(lab.folder / f"notes-{number}-{rank}") for rank in range(ranks)]
        for step in range(4 * number, 4 * number + 4):
            assert {len(share[step]) for share in shares} == {8 // ranks}  # disjoint, by the next line
            assert list(itertools.chain(*(share[step] for share in shares))) == plan.ids(step).tolist()
        assert all(set(share) == set(range(4 * number, 4 * number + 4)) for share in shares)
    moved, still = load_bank(lab.folder / "runs" / "moving"), load_bank(whole.folder(1))
    for rank in range(2):  # none was overwritten by another's
        assert_same(torch.load(lab.folder / f"bank-{rank}.pt", weights_only=True), moved)
    assert moved["id"].tolist() == list(range(48))
    assert torch.equal(moved["written_at"], still["written_at"])
    assert int(moved["written_at"].max()) == STEPS - 1


def test_sharded_bank_trains_and_resumes_as_a_replicated_one(lab, whole):
    """The run is killed and resumed; metrics.csv has the loss of rank 0, and the whole bank."""
    sharded = "bank.placement=sharded"
    assert lab.kill_when("tell_step", 6, "parts", sharded, delay_s=0.01, ranks=2).codes == [-9, -9]
    parts, one = lab.finish("parts", sharded, ranks=2), whole(2)
    assert_same(parts.trainer, one.trainer)
    assert parts.encoder == one.encoder
    assert_same(load_bank(lab.folder / "runs" / "parts"), load_bank(whole.folder(2)))
    for name in ("train/loss", "bank/fill", "bank/age_mean"):
        assert [row[name] for row in parts.rows.values()] == [row[name] for row in one.rows.values()]


def test_ranks_of_unequal_speed_end_a_time_budget_together(lab):
    """Rank 0's clock decides; by its own, rank 1 would train for 3 more steps, alone."""
    faults = {rank: [["pretend_speed", step_s]] for rank, step_s in enumerate((1.0, 0.8))}
    ended = lab.run("budget", "schedule.minutes=0.25", ranks=2, faults=faults)
    assert ended.codes == [0, 0], ended.err
    assert (ended.result["steps"], ended.result["planned_steps"]) == (14, 14)
    resumed = lab.run("budget", "schedule.minutes=0.25", ranks=2, faults=faults)
    assert resumed.codes == [0, 0], resumed.err
    assert all("this run is finished" in err for err in resumed.err)


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        (1, "contrastive.module:ContrastiveModule.training_step"),
        pytest.param(1, "contrastive.data.loader:ResidentLoader._next", marks=pytest.mark.faults),
        pytest.param(0, "contrastive.callbacks.metrics:LogMetrics.on_step", marks=pytest.mark.faults),
    ],
)
def test_rank_that_hangs_is_named_and_the_run_ends(lab, rank, where):
    run = lab.start("hanging", "run.hang_s=4", ranks=2, faults={rank: [["hang_at", 6, where]]})
    ended = run.wait()
    assert ended.codes == [1, 1]
    named = f"rank {rank} on {socket.gethostname()}, process {run.pids[rank]}, hangs; the others wait for it"
    for err in ended.err:
        assert f"no progress for 4 s: {named}\n" in err
    assert lab.finish("hanging", ranks=2).rows  # from the checkpoint of step 4


@pytest.mark.faults
def test_rank_whose_machine_stands_still_is_named(lab):
    run = lab.start("frozen", "run.hang_s=4", "schedule.epochs=200", ranks=2)
    while not (lab.folder / "runs" / "frozen" / "metrics.csv").is_file():
        time.sleep(0.05)
    run.kill(signal.SIGSTOP, [1])
    assert run.zygote.wait(run.pids[0]) == 1
    run.kill(signal.SIGKILL, [1])
    assert run.zygote.wait(run.pids[1]) == -9
    assert "rank 1 gives no sign of life" in run.logs[0].with_name(f"{run.logs[0].name}.err").read_text()


def test_ranks_that_see_different_folders_are_refused(lab):
    """Each node has its own disk, so rank 1 does not find what rank 0 saved."""
    assert lab.run("apart", "trainer.max_steps=4").codes == [0]
    places = as_ranks(2)
    roots = [lab.folder / "runs", lab.folder / "other"]
    runs = [
        lab.start("apart", f"run.root={root}", "trainer.devices=2", env=place)
        for root, place in zip(roots, places, strict=True)
    ]
    for run in runs:
        ended = run.wait()
        assert ended.codes == [2]
        assert "the ranks start at steps 4, 0: run.root=" in ended.err[0]


@pytest.mark.faults
def test_the_command_starts_its_ranks_itself(lab, whole):
    """Lightning runs the command a second time for rank 1; nothing here is forked or prepared."""
    argv = [*TINY, *lab.overrides, f"data.root={lab.folder / 'photos'}", f"run.root={lab.folder / 'runs'}"]
    command = [sys.executable, "-m", "contrastive", *argv, "run.name=own", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    outcome(lab.folder / "runs" / "own").assert_equals(whole(2))
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert again.stdout == done.stdout  # it is finished

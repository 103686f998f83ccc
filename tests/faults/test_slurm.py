"""Simulate SLURM: two processes in the environment of two nodes, a scontrol that notes its arguments."""

import os
import subprocess

import pytest

from tests.faults.harness import ROOT, Started, free_port


@pytest.fixture
def tools(tmp_path):
    """Make a folder with a scontrol and srun that note their arguments; return it and its PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("scontrol", "srun"):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.asked\n')
        (folder / name).chmod(0o755)
    return folder


def places(folder, **more):
    common = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_LOCALID": "0",
        **more,
    }
    return [common | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in range(2)]


def on_two_nodes(lab, tools, *overrides, faults=()):
    started = [
        lab.start("job", "trainer=slurm", *overrides, env=env, faults=faults if node else ())
        for node, env in enumerate(places(tools))
    ]
    return Started(lab.zygote, [run.pids[0] for run in started], [run.logs[0] for run in started]).wait()


def test_preempted_job_is_queued_again_and_goes_on(lab, whole, tools):
    ended = on_two_nodes(lab, tools, faults=[["signal_at", 5, "SIGUSR1"]])  # of the second node alone
    assert ended.codes == [75, 75], ended.err
    assert (tools / "scontrol.asked").read_text() == "requeue 4321\n"
    assert "stopped by SIGUSR1 after saving" in ended.err[0]
    assert "SLURM will run job 4321 again" in ended.err[0]
    assert not ended.out[1]  # one result, of the first node

    ended = on_two_nodes(lab, tools)
    assert ended.codes == [0, 0], ended.err
    from tests.faults.harness import outcome

    outcome(lab.folder / "runs" / "job").assert_equals(whole(2))
    # Started once more, there is nothing to do, and no rank waits for another.
    assert on_two_nodes(lab, tools).codes == [0, 0]


def test_cancelled_job_saves_and_is_not_queued_again(lab, tools):
    ended = on_two_nodes(lab, tools, faults=[["signal_at", 2, "SIGTERM"]])
    assert ended.codes == [75, 75], ended.err
    assert not (tools / "scontrol.asked").exists()


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_TASK_ID": "3"}], ids=["job", "array"])
def test_batch_file_starts_a_process_a_task(tools, array):
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NAME": "seeds", **array}
    script = ROOT / "scripts" / "slurm.sbatch"
    subprocess.run([script, "--config", "cifar10"], env=environment, check=True)
    more = " run.name=seeds-3 run.seed=3" if array else ""
    expected = f"--kill-on-bad-exit=1 contrastive-pretrain --config cifar10{more} trainer=slurm\n"
    assert (tools / "srun.asked").read_text() == expected

"""Train on shards behind a server that runs are killed over, that goes away, and that answers badly."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive.data.files import open_tree
from contrastive.data.order.blocks import BlockOrder
from contrastive.data.plan import Plan
from contrastive.data.shards.pack import pack
from tests.faults.conftest import OVERRIDES, STEPS
from tests.faults.harness import LIMIT_S, ROOT, TINY, Lab, load_bank, outcome
from tests.faults.test_kill import long
from tests.faults.test_ranks import rows_by_step
from tests.object_server import ObjectServer

BLOCKS = ["data.order=blocks", "data.blocks.rows=4", "data.blocks.interleave=2"]
STREAMED = ["data.resident=false", "data.num_workers=0", "data.remote.retry_s=0.3"]


@pytest.fixture(scope="module")
def site(zygote, tmp_path_factory):
    """A server of 48 images in shards, and the undisturbed run over them."""
    folder = tmp_path_factory.mktemp("site")
    lab = Lab(zygote, folder, [*OVERRIDES, "data.name=shards", *BLOCKS])
    pack(open_tree(folder / "photos", 16), folder / "set", shard_bytes=30_000, shuffle=True)
    assert len(list((folder / "set").glob("*.tar"))) > 2
    server = ObjectServer(folder / "set")
    lab.overrides.append(f"data.root={server.url}")
    yield server, lab
    server.close()


@pytest.fixture(scope="module")
def undisturbed(site):
    return site[1].finish("undisturbed", *STREAMED)


@pytest.fixture(autouse=True)
def healthy(site):
    site[0].most_shards, site[0].requests, site[0].faults = None, [], []


@pytest.mark.parametrize(
    ("workers", "cached", "kills"),
    [(2, True, 1), *(long(*case, 20) for case in itertools.product((0, 2), (0, 1)))],
)
def test_kill_9_over_shards(site, undisturbed, workers, cached, kills, tmp_path):
    lab, chance = site[1], random.Random(workers)
    reading = [*STREAMED[::2], f"data.num_workers={workers}"]
    reading += [f"data.remote.cache={tmp_path / 'cache'}"] * cached
    for trial in range(kills):
        name = f"killed-{workers}-{cached}-{trial}-{kills}"
        step, delay_s = chance.randrange(0 if kills > 1 else 5, STEPS), chance.uniform(0, 0.04)
        assert lab.kill_when("tell_step", step, name, *reading, delay_s=delay_s).codes == [-9]
        lab.finish(name, *reading).assert_equals(undisturbed)
    assert any((tmp_path / "cache").glob("*/*")) == cached


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0)])
def test_server_that_goes_away_ends_the_run_and_loses_no_checkpoint(site, undisturbed, ranks, workers):
    server, lab = site
    server.most_shards = 11 * ranks
    ended = lab.run(f"lost-{ranks}", *STREAMED, f"data.num_workers={workers}", ranks=ranks)
    assert ended.codes == [3] * ranks, ended.err
    assert "gave up after" in "".join(ended.err)
    assert all(
        "run the same command again when it is back" in err or "another rank" in err for err in ended.err
    )
    assert not any("Traceback" in err for err in ended.err)
    assert not ended.result["finished"]
    assert ended.result["steps"] >= 4
    server.most_shards = None
    server.faults += [None, 500, *[None] * 6, "cut"]  # back, but not well
    resumed = lab.finish(f"lost-{ranks}", *STREAMED)
    assert server.faults == []
    if ranks == 1:
        resumed.assert_equals(undisturbed)
    assert load_bank(lab.folder / "runs" / f"lost-{ranks}")["id"].tolist() == list(range(48))


def test_one_of_two_ranks_is_killed_and_one_goes_on_alone(site, undisturbed):
    """The same rows in every step at both world sizes, and a bank of all rows, as old as when undisturbed."""
    lab = site[1]
    notes = lab.folder / "notes"
    faults = {rank: [["note_rows", f"{notes}-{rank}"]] for rank in range(2)}
    faults[1].append(["signal_at", 6, "SIGKILL"])
    ended = lab.run("apart", *STREAMED, ranks=2, faults=faults)
    assert ended.codes[1] == -9
    assert ended.codes[0] != 0
    alone = lab.run("apart", *STREAMED, faults=[["note_rows", f"{notes}-alone"]])
    assert alone.codes == [0], alone.err
    check_rows(
        [rows_by_step(Path(f"{notes}-{rank}")) for rank in range(2)], rows_by_step(Path(f"{notes}-alone"))
    )
    check_bank(lab, "apart")


def check_rows(shares, alone):
    plan = Plan(48, 0, 8, 2, BlockOrder(48, 0, 4, 2))
    assert min(alone) == 4
    for step in range(4):
        assert [row for share in shares for row in share[step]] == plan.ids(step).tolist()
    for step in range(4, STEPS):
        assert alone[step] == plan.ids(step).tolist()


def check_bank(lab, name):
    moved, still = (load_bank(lab.folder / "runs" / run) for run in (name, "undisturbed"))
    assert moved["id"].tolist() == list(range(48))
    assert torch.equal(moved["written_at"], still["written_at"])


@pytest.mark.faults
def test_torchrun_over_shards_loses_a_process_and_goes_on_with_another_number(site, undisturbed):
    lab = site[1]
    argv = [*TINY, *lab.overrides, *STREAMED[:2], f"run.root={lab.folder / 'runs'}", "run.name=torchrun"]

    def torchrun(processes, kill="- 0"):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *launcher, "-m", "tests.faults.killed", *argv]
        return subprocess.run(
            [*command, f"trainer.devices={processes}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": kill},
            capture_output=True,
            text=True,
            timeout=2 * LIMIT_S,
        )

    assert "Signal 9 (SIGKILL)" in torchrun(2, "1 6").stderr
    assert (lab.folder / "runs" / "torchrun" / "checkpoints" / "step-4").is_dir()
    for processes in (1, 2):  # the second finds it finished
        done = torchrun(processes)
        assert done.returncode == 0, done.stderr
    found = outcome(lab.folder / "runs" / "torchrun")
    assert sorted(found.rows) == list(range(1, STEPS + 1))
    check_bank(lab, "torchrun")

"""Train on shards behind a server that runs are killed over, that goes away, and that answers badly."""

import contextlib
import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.data.encoded import EncodedImages
from contrastive.data.files import open_tree
from contrastive.data.order.blocks import BlockOrder
from contrastive.data.plan import Plan
from contrastive.data.shards.pack import pack
from tests.faults.conftest import OVERRIDES, STEPS
from tests.faults.harness import LIMIT_S, ROOT, TINY, Lab, free_port, load_bank, outcome, read_rows
from tests.faults.test_kill import check_kills, long
from tests.faults.test_ranks import rows_by_step
from tests.object_server import ObjectServer

BLOCKS = ["data.order=blocks", "data.blocks.rows=4", "data.blocks.interleave=2"]
# The first steps of an epoch of many rows, with a rate that moves the weights and a bank that is mined.
ONE_EPOCH = ["schedule.epochs=1", "schedule.warmup_epochs=0", "mining.min_fill=1e-6"]
ONE_EPOCH += [f"trainer.max_steps={STEPS}"]
STREAMED = ["data.resident=false", "data.num_workers=0", "data.remote.retry_s=0.3"]
AWAY_S = 20


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


def reading(workers, cache):
    """Return the settings of a run that reads shards in ``workers`` processes, or keeps what it read."""
    kept = [] if cache is None else [f"data.remote.cache={cache}"]
    return [*STREAMED[::2], f"data.num_workers={workers}", *kept]


class Noise(EncodedImages):
    """Files of 8 x 8 random pixels, each another, made faster than PNG can be written."""

    size = 8

    def __init__(self, rows):
        self._pixels = np.random.default_rng(0).integers(0, 256, (rows, 8 * 8 * 3), dtype=np.uint8)

    def __len__(self):
        return len(self._pixels)

    def open(self, row):
        return io.BytesIO(b"P6 8 8 255 " + self._pixels[row].tobytes())

    def key(self, row):
        return f"{row}.ppm"

    def stamp(self, row):
        return self.key(row)


@pytest.fixture(scope="module")
def many(zygote, tmp_path_factory):
    """200,000 images in shards (or those of the folder SHARDS), where they lie, and the undisturbed run."""
    folder = tmp_path_factory.mktemp("many")
    root = Path(os.environ.get("SHARDS", folder / "set"))
    if "SHARDS" not in os.environ:
        pack(Noise(200_000), root, shard_bytes=2**25, shuffle=True)
    lab = Lab(zygote, folder, [*OVERRIDES, "data.name=shards", "data.order=blocks", *ONE_EPOCH])
    whole = lab.finish("undisturbed", f"data.root={root}", *STREAMED)
    server = ObjectServer(root)
    yield lab, {"server": server.url, "disk": root}, whole
    server.close()


@pytest.mark.parametrize(
    ("workers", "cached", "kills"),
    [(2, True, 1), *(long(*case, 20) for case in itertools.product((0, 2), (0, 1)))],
)
def test_kill_9_over_shards(site, undisturbed, workers, cached, kills, tmp_path):
    cache = tmp_path / "cache"
    check_kills(site[1], undisturbed, kills, workers, *reading(workers, cache if cached else None))
    assert any(cache.glob("*/*")) == cached


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "workers", "cached"),
    [*itertools.product(["server"], (0, 2), (False, True)), ("disk", 2, False)],
)
def test_kill_9_over_many_rows(many, place, workers, cached, tmp_path):
    lab, places, undisturbed = many
    cache = tmp_path / "cache"
    options = [f"data.root={places[place]}", *reading(workers, cache if cached else None)]
    check_kills(lab, undisturbed, 5, workers + 10 * cached, *options)
    assert any(cache.glob("*/*")) == cached


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0)])
def test_server_that_goes_away_ends_the_run_and_loses_no_checkpoint(site, undisturbed, ranks, workers):
    server, lab = site
    server.most_shards = 8 + 11 * ranks  # 8 images are looked at before the first step
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


@contextlib.contextmanager
def server_process(folder, port):
    """A server that ends with its connections; each answer is late, so that a run takes seconds."""
    command = [sys.executable, "-m", "tests.object_server", str(folder), str(port), "0.3"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def wait_until(holds):
    limit = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "retry_s"), [(0, 60), (2, 60), (0, 10)])
def test_server_gone_for_20_s(site, undisturbed, workers, retry_s):
    """Within the time of retries the run goes on; beyond, it ends, and goes on from its last checkpoint."""
    lab, name, port = site[1], f"gone-{workers}-{retry_s}", free_port()
    run_dir = lab.folder / "runs" / name
    with server_process(site[0].folder, port) as url:
        settings = [f"data.root={url}", *reading(workers, None), f"data.remote.retry_s={retry_s}"]
        run = lab.start(name, *settings)
        wait_until((run_dir / "checkpoints" / "step-4").exists)
    time.sleep(AWAY_S)
    assert 4 <= max(read_rows(run_dir)) < STEPS
    with server_process(site[0].folder, port):
        ended = run.wait()
        assert ended.codes == [0 if retry_s > AWAY_S else 3], ended.err
        assert ("gave up after" in ended.err[0]) == (retry_s < AWAY_S)
        lab.finish(name, *settings).assert_equals(undisturbed)


@pytest.mark.faults
def test_server_that_fails_late_or_cuts_its_answers_for_20_s(site, undisturbed):
    server, lab = site
    server.faults = [None] * 10 + [500, "cut", "slow"] * 1000
    settings = [*STREAMED[:2], "data.remote.retry_s=60", "data.remote.timeout_s=0.5"]
    run = lab.start("failing", *settings)
    wait_until(lambda: len(server.faults) < 3000)
    time.sleep(AWAY_S)
    assert len(server.faults) < 2997  # each was met
    server.faults = []
    ended = run.wait()
    assert ended.codes == [0], ended.err
    outcome(lab.folder / "runs" / "failing").assert_equals(undisturbed)


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

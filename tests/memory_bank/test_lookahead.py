"""mining.query=stored, and the overlapped worker against the synchronous path."""

import random
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from memory_bank import worker as worker_module
from memory_bank.retrieval import ivf as ivf_module
from memory_bank.worker import Inline, Worker
from tests.memory_bank.worlds import BATCH, CPU, World, assert_equal, miner, run


@pytest.mark.parametrize("lag", [1, 3])
def test_candidates_are_those_of_the_stored_key_lag_steps_ago_scored_afresh(lag):
    world = World()
    subject = miner(world, query="stored", lag=lag, num_hard=4, num_uniform=0, band=[0.0, 0.000001])
    run(subject, world, 8)
    keys = []
    for step in range(8, 16):
        keys.append(subject.bank.key.float().clone())  # before the write of ``step``
        ids, query, key = world.step(step)
        found = subject.negatives(query, key, ids, step)
        subject.write(key, ids, step)
        if step - 8 < lag:
            continue
        then, now = keys[step - 8 - lag + 1], keys[-1]
        for at, row in enumerate(ids.tolist()):
            scores = then @ then[row]
            scores[row] = -2
            wanted = set(scores.topk(4).indices.tolist())
            assert set(found.hard_ids[at].tolist()) == wanted
            fresh = now[found.hard_ids[at]] @ query[at]
            assert (fresh.diff() <= 1e-6).all(), "closest first, by the fresh query"


def test_a_row_without_a_key_gets_the_other_keys_of_the_batch():
    world, subject = World(), miner(World(), query="stored", min_fill=0.25)
    run(subject, world, 5)
    ids, query, key = world.step(5)  # the first epoch has eight steps: none of these has a key yet
    found = subject.negatives(query, key, ids, 5)
    assert (found.hard_ids == -1).all()
    assert (found.shared_log_weight[:, -BATCH:] == torch.where(torch.eye(BATCH) > 0, -torch.inf, 0.0)).all()


def test_rows_that_are_no_part_of_the_plan_are_looked_up_as_unknown():
    world, subject = World(), miner(World(), query="stored")
    run(subject, world, 10)
    ids, query, key = world.step(10)
    other = (ids + 1) % 96
    found = subject.negatives(query, key, other, 10)
    planned = torch.isin(other, ids)
    assert (found.hard_ids[~planned] == -1).all()
    assert (found.hard_ids[planned] >= 0).all()


def slow(monkeypatch, seed):
    """Delays before and after every look-up and index update of the worker."""
    rng, original = random.Random(seed), worker_module._run

    def delayed(jobs, *others):
        class Delayed:
            def get(self):
                item = jobs.get()
                if item is None:
                    return None
                job, event = item

                def late():
                    time.sleep(rng.choice([0] * 8 + [0.01, 0.08]))
                    job()
                    time.sleep(rng.choice([0, 0, 0.004]))

                return late, event

        original(Delayed(), *others)

    monkeypatch.setattr(worker_module, "_run", delayed)


@pytest.fixture
def load():
    """A thread that fights for the interpreter and one that fights for the cores."""
    stop = threading.Event()

    def count():
        while not stop.wait(0.001):
            sum(range(5000))

    def multiply():
        rows = torch.ones(64, 64)
        while not stop.wait(0.001):
            torch.mm(rows, rows)

    threads = [threading.Thread(target=work, daemon=True) for work in (count, multiply)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "policy",
    [
        {"lag": 2, "backend": "exact"},
        # One list visited of two: recall falls short at once, nprobe is raised, centroids are trained anew.
        {"lag": 1, "backend": "faiss", "index": "IVF2,SQ8", "nprobe": 1, "min_fill": 0.85}
        | {"recall_every": 7, "min_recall": 0.99},
    ],
)
def test_overlap_changes_no_bit_in_100_steps_under_load(monkeypatch, load, policy):
    world = World()
    monkeypatch.setattr(ivf_module, "_RETRAIN_STEPS", 30)
    expected = miner(world, query="stored", **policy)
    slow(monkeypatch, seed=1)
    overlapped = miner(world, query="stored", overlap=True, **policy)
    for step in range(100):
        ids, query, key = world.step(step)
        # Two micro-batches a step, as with accumulation; the bank is written once.
        halves = [slice(0, BATCH // 2), slice(BATCH // 2, None)]
        for half in halves:
            one, two = (
                subject.negatives(query[half], key[half], ids[half], step, batch_keys=key, batch_ids=ids)
                for subject in (expected, overlapped)
            )
            assert_equal(one, two)
        if step % 50 == 49:
            for subject in (expected, overlapped):
                subject.nearest(query, ids, step, 3)
            assert {name: float(value) for name, value in expected.metrics().items()} == pytest.approx(
                {name: float(value) for name, value in overlapped.metrics().items()}, abs=0, nan_ok=True
            )
        if step % 41 == 40:  # a step that was skipped: its loss was not finite
            continue
        expected.write(key, ids, step)
        overlapped.write(key, ids, step)
    overlapped.close()


def test_a_run_resumed_from_an_overlapped_one_is_the_run():
    world = World()
    whole, first, second = (miner(world, query="stored", overlap=True, lag=2) for _ in range(3))
    expected = run(whole, world, 24)
    run(first, world, 13)
    second.load_state_dict(first.state_dict())
    for found, wanted in zip(run(second, world, 11, start=13), expected[13:], strict=True):
        assert_equal(found, wanted)
    for subject in (whole, first, second):
        subject.close()


def test_a_failing_job_raises_its_own_traceback_in_the_caller_and_closes():
    world = World()
    subject = miner(world, query="stored", overlap=True)
    run(subject, world, 4)

    def broken_search(*_, **__):
        raise ZeroDivisionError("the index broke")

    subject.retrieval.search = broken_search
    with pytest.raises(ZeroDivisionError, match="the index broke") as caught:
        run(subject, world, 4, start=4)
    assert "broken_search" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ZeroDivisionError):
        subject.state_dict()
    subject.close()
    assert not subject._worker._thread.is_alive()


def test_a_failure_surfaces_at_the_next_submit_too():
    worker = Worker(CPU)
    worker.submit(lambda: 1 / 0 and None)
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: None)
    worker.close()


LOOP = """
import os, signal, sys, threading, time
import torch
from tests.memory_bank.worlds import World, miner, run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without
world = World()
subject = miner(world, query="stored", overlap=True)
run(subject, world, 4)
under_way, rows = threading.Event(), torch.ones(200, 200)

def long_search(*_, **__):
    under_way.set()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.mm(rows, rows)  # in and out of native code

subject.metrics()  # waits for the look-up before
subject.retrieval.search = long_search
run(subject, world, 1, start=4)
under_way.wait()
if sys.argv[1] == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
print("end of the loop")  # nobody closes the miner
"""


@pytest.mark.parametrize(("end", "code", "said"), [("plain", 0, ""), ("interrupt", -2, "KeyboardInterrupt")])
def test_a_process_ends_as_it_would_without_a_worker(end, code, said):
    """A thread caught in native code at exit would abort the process, or hang it."""
    arguments = [sys.executable, "-c", LOOP, end]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "terminate called" in done.stderr) == (code, False), done.stderr
    assert said in done.stderr
    assert ("end of the loop" in done.stdout) == (end == "plain")


def test_close_leaves_a_hanging_job_behind():
    hang = threading.Event()
    worker = Worker(CPU)
    worker.submit(lambda: hang.wait() and None)
    worker.close(timeout_s=0.1)
    assert worker._thread.is_alive()
    hang.set()


def test_a_closed_worker_says_so():
    worker = Worker(CPU)
    worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda: None)


def test_jobs_run_in_order_on_one_other_thread_with_the_callers_thread_count():
    seen = []
    worker = Worker(CPU)
    for number in range(20):
        worker.submit(
            lambda number=number: seen.append((number, threading.get_ident(), torch.get_num_threads()))
        )
    worker.wait()
    assert [number for number, *_ in seen] == list(range(20))
    assert {thread for _, thread, _ in seen} != {threading.get_ident()}
    assert len({thread for _, thread, _ in seen}) == 1
    assert {threads for *_, threads in seen} == {torch.get_num_threads()}
    worker.close()
    inline = Inline()
    inline.submit(lambda: seen.clear())
    assert seen == []

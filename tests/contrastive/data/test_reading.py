import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch

from contrastive.config import UserError
from contrastive.data import reading
from contrastive.data.arrays import ArrayImages
from contrastive.data.files import open_tree
from contrastive.data.reading import BatchRows, WorkerDied, decode_ahead, decode_all, read_in_order

CPU = torch.device("cpu")


class Odd(ArrayImages):
    """Does something of its own when a row is read."""

    def __init__(self, n, action):
        super().__init__("set", [np.zeros((n, 2, 2, 3), dtype=np.uint8)], 2)
        self.action = action

    def read(self, row):
        self.action(row)
        return super().read(row)


def test_all_at_once(tmp_path, write_image, capfd, monkeypatch):
    for number in range(150):  # more than one block of rows
        write_image(f"{number:03}.png", number)
    (tmp_path / "070.png").write_bytes(b"")
    decoded = decode_all(open_tree(tmp_path, 8))
    assert decoded.bad == {70: "empty file"}
    assert decoded.rows.tolist() == list(range(150))
    assert decoded.batch.ids.tolist() == [row for row in range(150) if row != 70]
    wanted = torch.arange(150, dtype=torch.uint8)
    wanted[70] = 0
    assert torch.equal(decoded.images, wanted[:, None, None, None].expand(-1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")
    decode_all(open_tree(tmp_path, 8), progress=True)
    assert capfd.readouterr() == ("", "")  # no bar in a file
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    decode_all(open_tree(tmp_path, 8), progress=True)
    out, err = capfd.readouterr()
    assert out == ""  # which is for results
    assert "decoding" in err
    assert err.endswith("\r")  # and wiped when done


def test_too_large_for_memory_is_explained(monkeypatch):
    monkeypatch.setattr(
        torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("can't allocate"))
    )
    images = ArrayImages("set", [np.zeros((2, 2, 2, 3), dtype=np.uint8)], 2)
    with pytest.raises(UserError, match=r"2 decoded images take 0.0 GiB.*data.resident=false"):
        decode_all(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order(tmp_path, write_image, workers):
    for number in range(10):
        write_image(f"{number}.png", number)
    (tmp_path / "4.png").write_bytes(b"")
    told = []
    batches = list(
        read_in_order(
            open_tree(tmp_path, 8),
            4,
            num_workers=workers,
            device=CPU,
            on_corrupt=lambda *bad: told.append(bad),
        )
    )
    assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [5, 6, 7], [8, 9]]
    assert all(batch.images[:, 0, 0, 0].tolist() == batch.ids.tolist() for batch in batches)
    assert told == [(4, "empty file")]


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_killed_worker_may_show_as_a_broken_connection(error, monkeypatch):
    def broken(loader):
        raise error
        yield

    monkeypatch.setattr(reading, "_start", broken)
    with pytest.raises(WorkerDied, match="a decoding process was killed"):
        next(decode_ahead(Odd(2, lambda row: None), [BatchRows(0, [0])], 1, CPU))


def test_a_killed_worker_is_an_error_not_a_hang():
    delivered = multiprocessing.Event()

    def action(row):
        if row == 5:
            delivered.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    handler = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    stream = decode_ahead(Odd(6, action), [BatchRows(0, [row, row + 1]) for row in (0, 2, 4)], 1, CPU)
    assert next(stream).batch.ids.tolist() == [0, 1]
    [worker] = [child for child in multiprocessing.active_children() if child not in others]
    # The death must not surface where the main thread happens to be, such as in the midst of saving.
    assert signal.getsignal(signal.SIGCHLD) is handler
    delivered.set()
    worker.join()
    with pytest.raises(WorkerDied, match=r"data.num_workers \(now 1\) or data.decode_size.*last checkpoint"):
        list(stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_data_set_is_not_taken_for_a_corrupt_file_or_a_dead_worker(workers):
    def action(row):
        raise RuntimeError("index file is locked")

    with pytest.raises(RuntimeError, match="index file is locked") as caught:
        next(decode_ahead(Odd(4, action), [BatchRows(0, [0])], workers, CPU))
    assert not isinstance(caught.value, WorkerDied)
    del caught  # and the worker, which its traceback holds: a garbage collection would wait for it


def test_workers_are_single_threaded_and_out_of_reach_of_signals_to_the_group():
    def action(row):
        assert torch.get_num_threads() == 1
        assert os.getpgrp() == os.getpid()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)

    assert [
        decoded.batch.ids.tolist()
        for decoded in decode_ahead(Odd(4, action), [BatchRows(0, [0, 1]), BatchRows(0, [2])], 1, CPU)
    ] == [
        [0, 1],
        [2],
    ]


def test_workers_end_with_their_stream():
    before = set(multiprocessing.active_children())
    stream = decode_ahead(Odd(8, lambda row: None), [BatchRows(0, [row]) for row in range(8)], 2, CPU)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


def test_only_the_batch_is_pinned(monkeypatch):
    """As the DataLoader's own thread does it, which would turn a plain tuple into a list."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    decoded = next(decode_ahead(Odd(4, lambda row: None), [BatchRows(0, [2, 3])], 0, CPU))
    decoded.bad[3] = "torn"
    moved = pin_memory(decoded)
    assert [tensor.shape for tensor in pinned] == [(2, 3, 2, 2), (2,)]
    assert (moved.rows.tolist(), moved.bad) == ([2, 3], {3: "torn"})
    assert moved.batch.ids.tolist() == [2]

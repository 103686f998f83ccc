"""A signal saves at the end of its step, on all ranks, and the run continues from there."""

import os
import signal
import socket

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only

from contrastive.checkpoint import integrity
from contrastive.checkpoint.folder import latest_valid
from tests.contrastive.callbacks.fits import fit, quiet, state_of
from tests.contrastive.checkpoint.saves import names
from tests.forked import run_forked
from tests.reference.equal import assert_same

pytestmark = quiet


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_the_end_of_its_step_and_the_resume_is_exact(tmp_path, name):
    _, whole, _ = fit(tmp_path / "whole")
    number = signal.Signals[name]
    before = signal.getsignal(number)
    seen = []

    def send(step):
        seen.append(step)
        if len(seen) == 3:  # the first of the two batches of the second step
            os.kill(os.getpid(), number)

    trainer, module, preemption = fit(tmp_path / "c", events=send, min_epochs=2)
    assert preemption.stopped_by == name
    assert getattr(module.handler_at_end, "__self__", None) is not preemption
    assert trainer.global_step == 2
    assert seen == [0, 0, 1, 1]
    assert names(tmp_path / "c") == ["last", "step-2"]
    assert signal.getsignal(number) == before

    _, module, preemption = fit(tmp_path / "c", resume=latest_valid(tmp_path / "c"))
    assert preemption.stopped_by is None
    assert module.losses == {index: loss for index, loss in whole.losses.items() if index >= 4}
    one, other = state_of(tmp_path / "whole" / "step-6"), state_of(tmp_path / "c" / "step-6")
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["bank"], other["bank"])


def test_a_signal_just_before_the_first_batch_is_taken_over_from_lightning(tmp_path):
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)  # runs before Preemption: Lightning's handler gets it

    trainer, _, preemption = fit(tmp_path / "c", callbacks=(Early(),))
    assert preemption.stopped_by == "SIGTERM"
    assert trainer.global_step == 1
    assert latest_valid(tmp_path / "c") == tmp_path / "c" / "step-1"


def test_handlers_are_handed_back_after_a_failure(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def fail(step):
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path / "c", events=fail)
    assert {number: signal.getsignal(number) for number in before} == before


def test_ranks_agree_on_stopping_and_survive_a_full_disk(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_forked(stop_one_rank, tmp_path / "c", port, processes=2, limit_s=150)
    assert names(tmp_path / "c") == ["last", "step-1", "step-3", "step-4"]


def stop_one_rank(rank, root, port):
    """Only rank 1 gets the signal, and the disk of rank 0 is full at step 2."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"}
    rank_zero_only.rank = rank  # read from there at its import
    torch.set_num_threads(1)
    seen, sync = [], integrity.sync

    def full(path):
        raise OSError(28, "No space left on device")

    def send(step):
        seen.append(step)
        integrity.sync = full if rank == 0 and step == 1 else sync
        if rank == 1 and len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, _, preemption = fit(
        root,
        every_steps=1,
        events=send,
        accumulate=1,
        strategy=DDPStrategy(process_group_backend="gloo"),
        ranks=2,
    )
    assert (trainer.global_step, preemption.stopped_by) == (4, "SIGTERM")

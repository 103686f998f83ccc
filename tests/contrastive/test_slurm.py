import os

import pytest

from contrastive import slurm
from contrastive.slurm import is_first_task, requeue


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that notes its arguments, and says no if ``refuse`` is there."""
    path = tmp_path / "scontrol"
    path.write_text(
        f'#!/bin/sh\nif [ -e {tmp_path}/refuse ]; then echo "Invalid job id" >&2; exit 1; fi\n'
        f'echo "$@" >> {tmp_path}/asked\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_job_and_a_task_of_an_array_are_queued_again_by_name(scontrol, monkeypatch):
    assert not requeue()
    assert not (scontrol / "asked").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1200")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert requeue()
    assert (scontrol / "asked").read_text() == "requeue 1234\nrequeue 1200_7\n"


def test_a_refusal_is_told_and_nothing_is_raised(scontrol, monkeypatch, caplog):
    monkeypatch.setattr(slurm.logger, "propagate", True)
    monkeypatch.setattr(slurm.logger.parent, "propagate", True)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    (scontrol / "refuse").touch()
    assert not slurm.requeue()
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm.requeue()
    # Once each, however many handlers of earlier tests hear of it.
    first, second = dict.fromkeys(
        record.getMessage() for record in caplog.records if record.name == slurm.logger.name
    )
    assert first == "scontrol requeue 1234 failed (Invalid job id); submit the job again by hand to continue"
    assert "No such file or directory: 'scontrol'" in second


@pytest.mark.parametrize("name", ["SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK"])
def test_a_process_of_any_higher_rank_is_not_the_first(name, monkeypatch):
    for each in ("SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(each, "0")
    assert is_first_task()
    monkeypatch.setenv(name, "1")
    assert not is_first_task()

"""Asking SLURM to run a job again."""

import logging
import os
import subprocess

logger = logging.getLogger(__name__)

_LIMIT_S = 60


def job() -> str | None:
    """The job as ``scontrol`` knows it (a task of an array: ``array_task``); None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def is_first_task() -> bool:
    """Whether this is rank 0, as launchers say it in the environment; known before Lightning is imported."""
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "RANK", "LOCAL_RANK"))


def requeue() -> bool:
    """Queue this job again; whether SLURM took it. A refusal is logged, since all that is lost is time."""
    name = job()
    if name is None:
        return False
    command = ["scontrol", "requeue", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        problem = f"{done.stderr.strip() or done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.error("%s failed (%s); submit the job again by hand to go on", " ".join(command), problem)
        return False
    logger.info("SLURM will run job %s again", name)
    return True

"""Requeue the current job of SLURM."""

import logging
import os
import subprocess

logger = logging.getLogger(__name__)

_LIMIT_S = 60


def job() -> str | None:
    """Return the job id for ``scontrol`` (``ARRAY_TASK`` for a task of an array); None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def is_first_task() -> bool:
    """Return whether this is rank 0 by the launcher's environment; works before Lightning is imported."""
    ranks = ("SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def requeue() -> bool:
    """Queue this job again; return whether SLURM accepted. A refusal is only logged: no work is lost."""
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
        logger.error("%s failed (%s); submit the job again by hand to continue", " ".join(command), problem)
        return False
    logger.info("SLURM will run job %s again", name)
    return True

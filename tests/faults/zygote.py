"""Import the program once in one process; every run is a fork of it, otherwise the same as a new process.

Reads one JSON object a line: ``{"start": {...}}`` answers with the pid, ``{"wait": pid}`` with how it ended
(exit code, or minus the signal). It never touches torch itself, so that a child begins with no thread, no
generator drawn from and no process group.
"""

import atexit
import gc
import json
import os
import sys
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

import contrastive.__main__
import contrastive.pretrain
from tests.faults import inject


def serve() -> None:
    requests = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    gc.freeze()  # or each child's first collection would copy all pages
    print("ready", file=answers, flush=True)
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                requests.close()
                answers.close()
                end(run(**request["start"]))
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(answer, file=answers, flush=True)


def run(argv: list[str], env: dict[str, str], out: str, err: str, faults: list[list[Any]]) -> int:
    """Do what ``python -m contrastive`` does, with output to files, after injecting the faults."""
    for number, path in enumerate((os.devnull, out, err)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ |= env
    sys.argv = ["contrastive", *argv]
    rank_zero_only.rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))  # read from there at its import
    for name, *arguments in faults:
        getattr(inject, name)(*arguments)
    return contrastive.__main__.main(argv)


def end(code: int) -> None:
    """Exit like sys.exit, without tearing down a thousand modules: that takes longer than most runs here."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()

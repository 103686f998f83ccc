"""Run the command line, and kill -9 it in a step: ``[RANK STEP] -- ARGUMENTS``; for launchers."""

import os
import sys

from contrastive.__main__ import main
from tests.faults import inject

if __name__ == "__main__":
    split = sys.argv.index("--")
    if sys.argv[1:split]:
        rank, step = sys.argv[1:split]
        if os.environ["RANK"] == rank:
            inject.signal_at(int(step), "SIGKILL")
    sys.exit(main(sys.argv[split + 1 :]))

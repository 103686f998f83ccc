"""Run the command line; if KILL is ``RANK STEP``, kill -9 that rank in that step: for launchers."""

import os
import sys

from contrastive.__main__ import main
from tests.faults import inject

if __name__ == "__main__":
    rank, step = os.environ.get("KILL", "- 0").split()
    if os.environ["RANK"] == rank:
        inject.signal_at(int(step), "SIGKILL")
    sys.exit(main())

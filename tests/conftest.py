"""Shared fixtures. Our packages are imported inside fixtures, after the checks of types are in place."""

import atexit
import gc
import os

import pytest

from tests import typed

typed.install()

# Whoever runs the tests may be logged in to W&B: nothing of theirs belongs there.
os.environ["WANDB_MODE"] = "disabled"
# Processes that tests start compile our modules once, not each anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Flushes, a tenth of a tiny run, are for power cuts. A wrong descriptor is an error still; forked runs flush.
os.fsync = os.fstat


def pytest_collection_finish():
    """Keep the garbage collector from searching a million objects of imported libraries again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def wandb_ends():
    """W&B's service process ends with the test."""
    yield
    import wandb
    from wandb.sdk.data_types._private import MEDIA_TMP

    wandb.teardown()
    atexit.register(MEDIA_TMP.cleanup)  # otherwise Python does it, and complains

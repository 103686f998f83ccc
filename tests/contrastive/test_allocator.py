import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from contrastive.allocator import keep_freed_memory

{first}
for step in range(60):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2_000_000) for each in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 2_000_000 // 4096  # of one tensor


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_the_memory_of_a_step_is_that_of_the_step_before():
    assert faults("keep_freed_memory()") < PAGES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536")],
)
def test_a_setting_of_the_environment_wins(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert faults("keep_freed_memory()") > 10 * PAGES


def faults(first):
    """Page faults of fifty steps that each allocate and free eight tensors."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(first=first)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)

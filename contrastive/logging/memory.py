"""Measure the peak memory of a run."""

import resource
import sys

import torch


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Return ``system/...``: peak MiB of this process so far and, with an accelerator, of its memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    peaks = {"system/host_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    if device.type == "cuda":
        peaks["system/device_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peaks


def peak_memory(device: torch.device) -> int:
    """Return the peak in MiB, of the accelerator if there is one, else of the process."""
    peaks = peak_memory_mib(device)
    return round(peaks.get("system/device_memory_mib", peaks["system/host_memory_mib"]))

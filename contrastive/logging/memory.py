"""How much memory a run has needed."""

import resource
import sys

import torch


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """``system/...``: most MiB held so far by this process and, where there is one, on its accelerator."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    found = {"system/host_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    if device.type == "cuda":
        found["system/device_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def peak_memory(device: torch.device) -> int:
    """Return the peak in MiB, of the accelerator where there is one, else of the process."""
    found = peak_memory_mib(device)
    return round(found.get("system/device_memory_mib", found["system/host_memory_mib"]))

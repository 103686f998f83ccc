"""Look at the machine: the device that will train, and its memory."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from contrastive.data.reading import usable_cpus
from contrastive.trainer_settings import cpu_takes_bf16


@dataclass(frozen=True)
class Machine:
    """Describe the machine, as far as settings depend on it.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``: what Lightning will train on.
        name: Name of the device, for people.
        cores: Processors that this process may use.
        memory: Bytes of the memory that the training device has.
        bfloat16: Whether the device computes in bfloat16.
        devices: Number of such devices.
    """

    device: str
    name: str
    cores: int
    memory: int
    bfloat16: bool
    devices: int = 1

    @property
    def has_gpu(self) -> bool:
        """Return whether the device is a CUDA GPU."""
        return self.device == "cuda"

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / 2**30:.0f} GiB, {self.cores} processor{'s' * (self.cores > 1)}"


def look_at_machine(accelerator: Any = "auto") -> Machine:
    """Look at the first device that ``trainer.accelerator`` would take.

    Args:
        accelerator: The setting. ``cpu`` and ``mps`` rule out a CUDA GPU; others take one if there is any.
    """
    wanted = str(accelerator)
    cores = usable_cpus()
    if torch.cuda.is_available() and wanted not in ("cpu", "mps"):
        device = torch.cuda.get_device_properties(0)
        bfloat16 = device.major >= 8  # older ones emulate it
        return Machine("cuda", device.name, cores, device.total_memory, bfloat16, torch.cuda.device_count())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.backends.mps.is_available() and wanted != "cpu":
        return Machine("mps", "Apple GPU", cores, memory, False)
    return Machine("cpu", "CPU", cores, memory, _cpu_computes_in_bfloat16())


def _cpu_computes_in_bfloat16() -> bool:
    """Return whether bfloat16 is faster than float32: oneDNN takes it, and the processor has instructions.

    Without torch's list of instructions, False.
    """
    get = getattr(torch.cpu, "get_capabilities", None)
    return get is not None and bool(get().get("avx512_bf16")) and cpu_takes_bf16()

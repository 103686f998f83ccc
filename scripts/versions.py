"""Print the processor and the versions that a test run belongs to; kernels differ between processors."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ["torch", "torchvision", "pytorch-lightning", "kornia", "faiss-cpu", "omegaconf", "wandb", "numpy"]
CPUINFO = Path("/proc/cpuinfo")


def main() -> None:
    """Print one line each for the processor, for torch on it, and for the versions."""
    facts = read_cpuinfo(CPUINFO)
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx")))
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    print(f"processor: {name}, {os.cpu_count()} cores, {' '.join(flags) or 'no avx or amx'}")
    print(f"torch on it: {torch.backends.cpu.get_cpu_capability()}, bfloat16 {'yes' if bf16 else 'no'}")
    found = [f"{package} {metadata.version(package)}" for package in PACKAGES]
    print(f"versions: Python {platform.python_version()}, {', '.join(found)}")


def read_cpuinfo(path: Path) -> dict[str, str]:
    """Read the fields of the first processor; none where there is no such file (not Linux)."""
    if not path.is_file():
        return {}
    lines = path.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    main()

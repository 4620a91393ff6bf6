"""Memory of device and host, beyond what PyTorch's allocator does by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def give_back_memory(device: torch.device) -> None:
    """Return what the allocator keeps of freed tensors to the device.

    Where weights make way for smaller ones, these would be put into what is left of the former, and the rest of it be
    lost for large tensors.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_host_memory() -> int:
    """Bytes of the host's memory that programs may still have; infinitely many where the system doesn't tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    told = (line.split() for line in lines)
    return next((int(words[1]) * 1024 for words in told if words[0] == "MemAvailable:"), sys.maxsize)

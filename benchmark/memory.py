"""Peak memory between two moments: what the device's allocator holds, or on a CPU the process's resident set.

What PyTorch's allocator holds (reserves), not what is allocated in it: a CUDA graph's intermediates lie in its pool for
as long as the graph lives, and count as allocated only while it is captured.
"""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path

import torch

from utils.device_memory import give_back_memory


def reset_peak(device: torch.device) -> None:
    """Begin anew; what a GPU's allocator merely keeps from before is given back, so that it doesn't count."""
    if device.type == "cuda":
        gc.collect()
        give_back_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Resets VmHWM, see proc(5); where that isn't allowed, the peak is that since the process's start.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Bytes at most since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024

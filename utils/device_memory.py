"""Memory of the device, beyond what PyTorch's allocator does by itself."""

from __future__ import annotations

import torch


def give_back_memory(device: torch.device) -> None:
    """Return what the allocator keeps of freed tensors to the device.

    Where weights make way for smaller ones, these would be put into what is left of the former, and the rest of it be
    lost for large tensors.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""NVIDIA's package cuda-bindings, which comes with PyTorch's CUDA builds: the driver's and the compiler's functions."""

from __future__ import annotations

import importlib.util
from typing import Any

from utils.errors import UserError


def installed() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def call(library: Any, name: str, *args: Any, what: str) -> tuple:
    """What a function of `cuda.bindings.driver` or `.nvrtc` gives besides its status; of two kinds of one (CUDA 12) the
    newer.

    Raises:
        MemoryError: the GPU's memory didn't suffice.
        UserError: it failed. The message begins with `what`.
    """
    status, *results = getattr(library, f"{name}_v2", getattr(library, name))(*args)
    if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise MemoryError(f"{what}: {name} failed with {status.name}")
    if status.value != 0:
        raise UserError(f"{what}: {name} failed with {status.name}")
    return tuple(results)

"""float32 convolutions computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """In its body cuDNN takes no TF32 for convolutions in float32, which it does by default: that rounds more than a
    tolerance of 1e-4 allows, and otherwise for another algorithm or memory format."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed

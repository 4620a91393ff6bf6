"""Convolutions' results laid out as the compiler takes them to be.

Inductor asks FakeTensor for the strides of a convolution's result, and FakeTensor's cache may hold, for the very same
tensors, an answer from when they seemed to be on no device: contiguous, where cuDNN's result has its channels
innermost. torch.compile looks at run time and fails; a package doesn't look, and reads every value from another place.
Seen with PyTorch 2.11, of convolutions without bias whose input and weights are channels_last and have no gradients.
So what holds convolutions is compiled without that cache, which takes longer; blocks of Linears are compiled with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def as_computed(module: nn.Module) -> AbstractContextManager[None]:
    """Around tracing and compiling a module: no layout comes from the cache if it holds a convolution."""
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return nullcontext()
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)

"""To know when a module's weights move: what reads them where they lie has to find them anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def when_moved(module: nn.Module, forget: Callable[[], object]) -> None:
    """Call `forget` after `module.to(...)`, `.half()`, `.cuda()`, ..., also of a module that it is part of, where that
    gave its tensors other memory.

    Source: torch.nn.Module._apply, through which they all go.
    """
    original = module._apply

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        before = _addresses(module)
        result = original(*args, **kwargs)
        if _addresses(module) != before:
            forget()
        return result

    object.__setattr__(module, "_apply", apply)


def _addresses(module: nn.Module) -> list[int]:
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return [part.data_ptr() for tensor in tensors for part in _parts(tensor)]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor subclass's own tensors, such as float8 values and their scale; of another it itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]

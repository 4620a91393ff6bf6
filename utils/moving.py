"""To know when a module's weights move: what reads them where they lie has to find them anew."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from utils.components import plain_tensors


def when_moved(module: nn.Module, forget: Callable[[], object]) -> None:
    """Call `forget` after `module.to(...)`, `.half()`, `.cuda()`, ..., also of a module that it is part of, and after
    `load_state_dict(..., assign=True)`, where that gave its tensors other memory.

    Source: torch.nn.Module._apply, through which all but the last go, and its hooks around load_state_dict.
    """
    original: Any = module._apply.__func__  # type: ignore[attr-defined]  # or what this function made of it before

    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = _addresses(self)
        result = original(self, *args, **kwargs)
        if _addresses(self) != before:
            forget()
        return result

    before_loading: list[int] = []

    def note(module: nn.Module, *_: Any) -> None:
        before_loading[:] = _addresses(module)

    def compare(module: nn.Module, *_: Any) -> None:
        if _addresses(module) != before_loading:
            forget()

    module.register_load_state_dict_pre_hook(note)
    module.register_load_state_dict_post_hook(compare)
    # A method, so that a copy of the module gets its own, and not this one's.
    object.__setattr__(module, "_apply", MethodType(apply, module))


def _addresses(module: nn.Module) -> list[int]:
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return [part.data_ptr() for tensor in tensors for part in plain_tensors(tensor)]

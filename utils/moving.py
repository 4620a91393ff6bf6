"""To know when a module's weights move: what reads them where they lie has to find them anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from utils.components import plain_tensors

_WATCH = "_watch"


def when_moved(module: nn.Module, forget: Callable[[], object]) -> None:
    """Call `forget` when tensors or parts of `module` are others than they were, or lie elsewhere, or a part has got a
    hook or another of diffusers' attention processors.

    That is looked at after `module.to(...)`, `.half()`, `.cuda()`, ..., also of a module that it is part of, and after
    `load_state_dict(..., assign=True)`; and, for all else, such as a part's new weight, before the module is called
    with other tensors throughout: a pipeline's steps have some in common, its calls none.

    Source: torch.nn.Module._apply, through which all the first go, and its hooks.
    """
    watch = module.__dict__.get(_WATCH)
    if watch is None:
        watch = _Watch(module)
        setattr(module, _WATCH, watch)
    watch.told.append(forget)


class _Watch:
    def __init__(self, module: nn.Module):
        self.told: list[Callable[[], object]] = []
        self._parts = list(module.modules())
        self._known = self._state()
        self._given: list[weakref.ref[torch.Tensor]] = []
        original: Any = module._apply.__func__  # type: ignore[attr-defined]

        def apply(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = original(this, *args, **kwargs)
            self._look(this)
            return result

        # A method, so that a copy of the module gets its own, and not this one's.
        object.__setattr__(module, "_apply", MethodType(apply, module))
        module.register_load_state_dict_post_hook(lambda loaded, _: self._look(loaded))
        module.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)

    def _before_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # an export of the module itself
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [tensor() for tensor in self._given]
        if not any(one is other for one in given for other in before):
            self._look(module)
        self._given = [weakref.ref(tensor) for tensor in given]

    def _look(self, module: nn.Module) -> None:
        if self._state() != self._known:
            self._parts = list(module.modules())
            self._known = self._state()
            for forget in self.told:
                forget()

    def _state(self) -> tuple[list[int], ...]:
        """Which tensors and parts there are, where the tensors lie, how many hooks each part has, and its processor."""
        tensors = [
            tensor
            for part in self._parts
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if tensor is not None
        ]
        children = [id(child) for part in self._parts for child in part._modules.values()]
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in self._parts[1:]]
        processors = [id(part.__dict__.get("processor")) for part in self._parts]
        addresses = [address for tensor in tensors for address in _addresses(tensor)]
        return children, hooks, processors, [id(tensor) for tensor in tensors], addresses


def _addresses(tensor: torch.Tensor) -> list[int]:
    plain = [tensor] if type(tensor) in (nn.Parameter, torch.Tensor) else plain_tensors(tensor)
    return [part.data_ptr() for part in plain]

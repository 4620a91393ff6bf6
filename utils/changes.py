"""To know when a module's weights are others or lie elsewhere: what reads them where they lay has to find them anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import nn

from utils.components import plain_names

_WATCH = "_watch"


def when_changed(module: nn.Module, forget: Callable[[], object]) -> None:
    """Call `forget` when tensors or parts of `module` are others than they were, or lie elsewhere, or a part has got
    other hooks or another of diffusers' attention processors.

    That is looked at after `module.to(...)`, `.half()`, `.cuda()`, ..., also of a module that it is part of, and after
    `load_state_dict(..., assign=True)`; and, for all else, such as a part's new weight, before the module is called.
    That takes a millisecond, so a transformer's steps are spared: calls of the same `img_ids`, which a pipeline makes
    once a call.

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
        self._ids: weakref.ref[torch.Tensor] | None = None
        self._look_at(module)
        original: Any = module._apply.__func__  # type: ignore[attr-defined]

        # Of a module's copy, these are to look at the copy, with its own watch.
        def apply(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = original(this, *args, **kwargs)
            this.__dict__[_WATCH].look(this)
            return result

        object.__setattr__(module, "_apply", MethodType(apply, module))
        module.register_load_state_dict_post_hook(lambda this, _: this.__dict__[_WATCH].look(this))
        module.register_forward_pre_hook(_before_call, prepend=True, with_kwargs=True)

    def is_step(self, ids: torch.Tensor | None) -> bool:
        """Whether the last call had the same position ids."""
        if ids is None or (self._ids is not None and self._ids() is ids):
            return ids is not None
        self._ids = weakref.ref(ids)
        return False

    def look(self, module: nn.Module) -> None:
        tensors = self._tensors()
        if self._identities(tensors) != self._known or self._addresses(tensors) != self._places:
            self._look_at(module)
            for forget in self.told:
                forget()

    def _look_at(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._children = [part._modules for part in parts if part._modules]
        self._holders = [held for part in parts for held in (part._parameters, part._buffers) if held]
        self._hooks = [hooks for part in parts[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._attentions = [part.__dict__ for part in parts if "processor" in part.__dict__]
        tensors = self._tensors()
        names = [plain_names(tensor) for tensor in tensors]
        self._plain = [index for index, inner in enumerate(names) if not inner]
        self._inner = [(index, name) for index, inner in enumerate(names) for name in inner]
        self._known, self._places = self._identities(tensors), self._addresses(tensors)

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for held in self._holders for tensor in held.values() if tensor is not None]

    def _identities(self, tensors: list[torch.Tensor]) -> tuple[list[Any], ...]:
        """Which parts, tensors, hooks and processors there are."""
        return (
            [*map(id, chain.from_iterable(held.values() for held in self._children))],
            [*map(id, tensors)],
            [*map(type, tensors)],  # torch.utils.swap_tensors gives one another
            [*chain.from_iterable(self._hooks)],  # their keys, which no other hook has
            [id(attention["processor"]) for attention in self._attentions],
        )

    def _addresses(self, tensors: list[torch.Tensor]) -> list[int]:
        """Where they lie, of the tensors that were looked at: a subclass takes long to say what it consists of."""
        plain = [tensors[index].data_ptr() for index in self._plain]
        return plain + [getattr(tensors[index], name).data_ptr() for index, name in self._inner]


def _before_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    watch = module.__dict__[_WATCH]
    if not torch.compiler.is_compiling() and not watch.is_step(kwargs.get("img_ids")):
        watch.look(module)

"""A pipeline that takes it that none of its modules has hooks, instead of looking for them at every call.

To find out which device it computes on, diffusers looks through all 2,100 modules of FLUX.1 for hooks of offloading,
before each text encoder runs through its own (464 in T5-XXL), and, when the image is there, through
the transformer's for those of step caching: some milliseconds of the host, in which the GPU has nothing to do. What is
left is a look through the VAE's modules, in which it mostly has. A recipe refuses such hooks before and after it
(recipes/guards.py), but for those that diffusers' functions set on a module (`apply_first_block_cache`): don't.

Source: DiffusionPipeline._execution_device, get_module_execution_device and CacheMixin._reset_stateful_cache of
diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe
from utils.components import modules
from utils.mixin import mix_in


class Unhooked(DiffusionPipeline):
    """Mixin for a pipeline without hooks."""

    @property
    def _execution_device(self) -> torch.device:
        """Where the first of its components with weights has the first of them, on the CPU only if all have."""
        weights = (next(part.parameters(), None) for part in modules(self).values())
        devices = [weight.device for weight in weights if weight is not None]
        return next((device for device in devices if device.type not in ("cpu", "meta")), devices[0])

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own."""
        with ExitStack() as stack:
            for encoder in (self.text_encoder, self.text_encoder_2):
                if encoder is not None:
                    stack.enter_context(_without_parts(encoder))
            return super().encode_prompt(*args, **kwargs)


@contextmanager
def _without_parts(module: nn.Module) -> Iterator[None]:
    """The module is all of its `modules()`: a search ends at once."""
    module.modules = partial(iter, (module,))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.modules


def _reset_nothing(recurse: bool = True) -> None:
    """Stands in for CacheMixin._reset_stateful_cache."""


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    mix_in(pipe, Unhooked)
    for part in modules(pipe).values():
        if hasattr(part, "_reset_stateful_cache"):
            part._reset_stateful_cache = _reset_nothing  # type: ignore[assignment]
    return "no search for hooks at each call"


OPTIMIZATION = Optimization(
    field="hook_search_removal",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    without_hooks=lambda recipe: True,
)

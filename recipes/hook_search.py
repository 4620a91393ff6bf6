"""A pipeline that takes it that none of its modules has hooks, instead of looking for them at every call.

To find out which device it computes on, diffusers looks through all 2,100 modules of FLUX.1 for hooks of offloading,
and, when the image is there, through the transformer's for those of step caching: some milliseconds of the host, in
which the GPU has nothing to do. What is left are looks through the text encoders' and the VAE's modules, in which it
mostly has. A recipe refuses such hooks before and after it (recipes/guards.py), but for those that diffusers' functions
set on a module (`apply_first_block_cache`): don't.

Source: DiffusionPipeline._execution_device and CacheMixin._reset_stateful_cache of diffusers.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

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

"""No device synchronisation from the scheduler.

FlowMatchEulerDiscreteScheduler looks its first step's index up on the device (`nonzero().item()`), and the host waits
there for everything queued, unless it was told the index. Since diffusers PR 11696 the pipeline tells it; with this
optimization off, the scheduler doesn't listen, which is how it was before.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


class LookingUpFirstStep:
    """Mixin for a scheduler: forget the first step's index, so that it is looked up on the device."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Ignored."""


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    kind = type(pipe.scheduler)
    if recipe.scheduler_sync_removal == (not issubclass(kind, LookingUpFirstStep)):
        return _state(recipe)
    if recipe.scheduler_sync_removal:
        kind = next(base for base in kind.__mro__ if not issubclass(base, LookingUpFirstStep))
    else:
        kind = type(kind.__name__, (LookingUpFirstStep, kind), {"__module__": kind.__module__})
    pipe.scheduler.__class__ = kind  # what a user set on it stays
    return _state(recipe)


def _state(recipe: Recipe) -> str:
    return "no sync" if recipe.scheduler_sync_removal else "one sync at the first step"


OPTIMIZATION = Optimization(
    field="scheduler_sync_removal",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    always=True,
)

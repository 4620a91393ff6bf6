"""Step caching: what a denoising step would compute is taken from the steps before. Lossy, in two ways.

`FirstBlockCache` skips most of a step whose first block changes little, which it decides from data at each step: that
can't be captured, compiled or put into a package.

`StepSkipping` decides nothing from data. Which steps are computed follows from how many there are; in the others the
transformer isn't called, and its velocity lies on the line through the last two computed ones. So every recipe takes
it: packages, CUDA graphs, and all steps in one launch (recipes/loop_graph.py).

Both lie outside the ladder, whose rungs compute every step.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from recipes.optimization import Needs, Optimization
from recipes.recipe import FirstBlockCache, Recipe
from utils.errors import UsageError
from utils.mixin import mix_in


def computed(steps: int, speed_factor: float) -> list[bool]:
    """Which of a call's steps are computed: one of `speed_factor`, evenly, the first among them, and the last if there
    are two."""
    count = max(1, round(steps / speed_factor))
    places = {(2 * i * (steps - 1) + count - 1) // (2 * (count - 1)) for i in range(count)} if count > 1 else {0}
    return [step in places for step in range(steps)]


class Velocities:
    """The last two velocities that were computed, and the line through them.

    Source: the two-step Adams-Bashforth method, which integrates along that line.
    """

    def __init__(self) -> None:
        self._known: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=2)

    def computed(self, sigma: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """`velocity` [batch, tokens, channels] at `sigma`, float32 without dimensions, which is kept; itself."""
        self._known.append((sigma, velocity))
        return velocity

    def extrapolated(self, sigma: torch.Tensor) -> torch.Tensor:
        """The velocity at `sigma`, in the dtype of those before: the last one where there is only one."""
        *before, (last_sigma, last) = self._known
        if not before:
            return last
        first_sigma, first = before[0]
        slope = (last.float() - first.float()) / (last_sigma - first_sigma)
        return (last.float() + (sigma - last_sigma) * slope).to(last.dtype)


class SkippedSteps:
    """Stands before a transformer, which in a pipeline's call is only called in steps that are computed.

    What calls the transformer otherwise gets all computed. True classifier-free guidance calls it several times a step:
    each of them has velocities of its own.
    """

    def __init__(self, speed_factor: float):
        self.speed_factor = speed_factor
        self.pipe: DiffusionPipeline | None = None

    @contextmanager
    def call(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """A call of `pipe`."""
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(pipe.scheduler).__name__
            raise UsageError(
                f"skipped steps need a FlowMatchEulerDiscreteScheduler, not {name}: keep the pipeline's own, or use a "
                "recipe with cache=null"
            )
        self.pipe, self._step, self._index = pipe, -1, object()
        self._of_step: list[Velocities] = []
        try:
            yield
        finally:
            self.pipe, self._of_step = None, []

    def __call__(self, compute: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The transformer's call: `compute`, or what it would give."""
        if self.pipe is None:
            return compute(*args, return_dict=return_dict, **kwargs)
        scheduler, steps = self.pipe.scheduler, self.pipe.num_timesteps
        if scheduler.step_index != self._index:  # None at the first step, then one more a step
            self._index, self._step, self._calls = scheduler.step_index, self._step + 1, 0
        self._calls += 1
        if self._calls > len(self._of_step):
            self._of_step.append(Velocities())
        velocities = self._of_step[self._calls - 1]
        sigma = scheduler.sigmas[len(scheduler.sigmas) - 1 - steps + self._step]
        if computed(steps, self.speed_factor)[self._step]:
            out = compute(*args, return_dict=return_dict, **kwargs)
            velocities.computed(sigma, out[0])
            return out
        sample = velocities.extrapolated(sigma)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _skip_steps(pipe: DiffusionPipeline, speed_factor: float) -> None:
    skipped = SkippedSteps(speed_factor)
    pipeline, transformer = type(pipe), type(pipe.transformer)

    @functools.wraps(pipeline.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with skipped.call(self):
            return pipeline.__call__(self, *args, **kwargs)

    @functools.wraps(transformer.__call__)
    def step(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return skipped(functools.partial(transformer.__call__, self), *args, **kwargs)

    mix_in(pipe, __call__=call)
    mix_in(pipe.transformer, __call__=step)  # before its hooks, which a skipped step doesn't need


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    if isinstance(recipe.cache, FirstBlockCache):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=recipe.cache.threshold))
        return f"first-block cache, threshold {recipe.cache.threshold}"
    assert recipe.cache is not None
    if not recipe.loop_graph:  # which skips its steps itself
        _skip_steps(pipe, recipe.cache.speed_factor)
    return f"of {recipe.cache.speed_factor:g} steps one is computed, the others extrapolated"


OPTIMIZATION = Optimization(field="cache", needs=lambda recipe: Needs(), lossless=lambda recipe: False, apply=_apply)
